# One line an operator: interstate_add_operator(s4d PARTS reference cpu cuda)
#
# Every operator has the same files, so that who knows one knows all; configuration fails where one is
# missing. The line also adds the operator's tests and benchmarks.

# Lists in `missing` the files of the set that are not there.
function(interstate_missing_files operator parts missing)
    set(files include/${operator}/${operator}.hpp
              include/${operator}/params.hpp
              include/${operator}/reference.hpp
              docs/ops/${operator}.md
              tests/${operator}/reference_test.cpp)
    if("cpu" IN_LIST parts)
        list(APPEND files tests/${operator}/cpu_test.cpp
                          benchmarks/${operator}/cpu_bench.cpp)
    endif()
    if("cuda" IN_LIST parts)
        list(APPEND files include/${operator}/${operator}.cuh
                          tests/${operator}/cuda_test.cu
                          benchmarks/${operator}/cuda_bench.cu)
    endif()
    if("cuda_step" IN_LIST parts)  # a cuda executor that decodes, with tests of its own for that
        list(APPEND files tests/${operator}/cuda_step_test.cu)
    endif()
    if("cuda_fft" IN_LIST parts)  # a cuda executor with the caller's cuFFT plans
        list(APPEND files include/${operator}/fft.cuh
                          tests/${operator}/cuda_fft_test.cu)
    endif()
    set(absent "")
    foreach(file IN LISTS files)
        if(NOT EXISTS "${PROJECT_SOURCE_DIR}/${file}")
            list(APPEND absent ${file})
        endif()
    endforeach()
    set(${missing} "${absent}" PARENT_SCOPE)
endfunction()

function(interstate_add_operator operator)
    cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "PARTS")
    foreach(part IN LISTS arg_PARTS)
        if(NOT part MATCHES "^(reference|cpu|cuda|cuda_step|cuda_fft)$")
            message(FATAL_ERROR "Operator ${operator}: PARTS has '${part}', must be of: reference cpu cuda cuda_step cuda_fft")
        endif()
    endforeach()
    if(NOT "reference" IN_LIST arg_PARTS)
        message(FATAL_ERROR "Operator ${operator}: PARTS must have 'reference', the truth that other parts are held to")
    endif()
    if("cpu" IN_LIST arg_PARTS)
        set_property(GLOBAL APPEND PROPERTY INTERSTATE_CPU_OPERATORS ${operator})
    endif()
    if(NOT PROJECT_IS_TOP_LEVEL)
        return()  # the file set is our house rule, nobody else's build problem
    endif()

    interstate_missing_files(${operator} "${arg_PARTS}" missing)
    if(missing)
        list(JOIN missing "\n    " missing)
        message(FATAL_ERROR "Operator ${operator} lacks files that every operator has (CONTRIBUTING.md says what "
                            "each is for):\n    ${missing}")
    endif()

    if(INTERSTATE_BUILD_TESTS)
        foreach(part IN LISTS arg_PARTS)
            if(part STREQUAL "cuda")
                interstate_add_cuda_test(${operator} tests/${operator}/cuda_test.cu)
            elseif(part STREQUAL "cuda_step")
                interstate_add_cuda_test(${operator} tests/${operator}/cuda_step_test.cu PART step)
            elseif(part STREQUAL "cuda_fft")
                interstate_add_cuda_test(${operator} tests/${operator}/cuda_fft_test.cu PART fft CUFFT)
            elseif(NOT part STREQUAL "reference" OR INTERSTATE_TEST_REFERENCES)
                interstate_add_gtest(${operator}_${part}_test PREFIX ${operator}.${part} LABELS ${operator}
                                     SOURCES tests/${operator}/${part}_test.cpp)
            endif()
        endforeach()
    endif()
    if(INTERSTATE_BUILD_BENCHMARKS)
        foreach(part IN LISTS arg_PARTS)
            interstate_add_benchmark(${operator} ${part})
        endforeach()
    endif()
endfunction()

# Libraries that a CPU benchmark compares with, where they are found: FFTW in float (libfftw3-dev).
function(interstate_link_peers target)
    find_path(INTERSTATE_FFTW_INCLUDE fftw3.h)
    find_library(INTERSTATE_FFTW_LIBRARY fftw3f)
    mark_as_advanced(INTERSTATE_FFTW_INCLUDE INTERSTATE_FFTW_LIBRARY)
    if(INTERSTATE_FFTW_INCLUDE AND INTERSTATE_FFTW_LIBRARY)
        target_include_directories(${target} SYSTEM PRIVATE "${INTERSTATE_FFTW_INCLUDE}")
        target_link_libraries(${target} PRIVATE "${INTERSTATE_FFTW_LIBRARY}")
        target_compile_definitions(${target} PRIVATE INTERSTATE_BENCH_FFTW=1)
    else()
        message(STATUS "${target}: FFTW (libfftw3-dev) was not found, its rows are left out")
    endif()
endfunction()

# Google Benchmark for the CPU; a plain program for CUDA, which times with events and prints for itself.
function(interstate_add_benchmark operator part)
    set(target ${operator}_${part}_bench)
    if(part STREQUAL "cpu")
        add_executable(${target} benchmarks/${operator}/cpu_bench.cpp)
        target_compile_options(${target} PRIVATE ${INTERSTATE_BENCHMARK_OPTIONS})
        target_link_libraries(${target} PRIVATE interstate_own benchmark::benchmark benchmark::benchmark_main)
        interstate_link_peers(${target})
    elseif(part STREQUAL "cuda" AND INTERSTATE_HAVE_CUDA AND INTERSTATE_BUILD_GPU_PROGRAMS)
        add_executable(${target} benchmarks/${operator}/cuda_bench.cu)
        interstate_own_cuda(${target})
        interstate_find_cufft(cufft)
        if(cufft)
            target_link_libraries(${target} PRIVATE ${cufft})
            target_compile_definitions(${target} PRIVATE INTERSTATE_BENCH_CUFFT=1)
        else()
            message(STATUS "${target}: the CUDA toolkit has no cuFFT, its rows are left out")
        endif()
    else()
        return()  # the reference is for truth, not for speed
    endif()
    set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bench")
endfunction()

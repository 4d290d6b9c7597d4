# How our own programs are built. None of it reaches the targets that users link.

option(INTERSTATE_WERROR "Warnings are errors in Interstate's own tests, tools, examples and benchmarks"
       ${PROJECT_IS_TOP_LEVEL})
set(INTERSTATE_CUDA_ARCHITECTURES "80;90a" CACHE STRING "CUDA architectures of Interstate's own programs")

set(INTERSTATE_BENCHMARK_OPTIONS "" CACHE STRING "More compiler options of Interstate's own CPU benchmarks")

# Where nothing can run on a GPU, CUDA code is built to see that it builds; optimising it is most of the time that takes,
# and machine code is made of one architecture alone.
option(INTERSTATE_CUDA_QUICK "Compile Interstate's own CUDA programs fast rather than into fast code" OFF)
if(INTERSTATE_CUDA_QUICK AND INTERSTATE_HAVE_CUDA)
    include(CheckCompilerFlag)
    string(TOUPPER "CMAKE_CUDA_FLAGS_${CMAKE_BUILD_TYPE}" interstate_cuda_flags)
    set(${interstate_cuda_flags} "-O0")  # host code; an -O of another list of options would come before the one here
    check_compiler_flag(CUDA -Ofc=max INTERSTATE_NVCC_OFC)  # since CUDA 12.9
    set(interstate_cuda_architectures 80-virtual 90a-real)
else()
    unset(INTERSTATE_NVCC_OFC CACHE)
    set(interstate_cuda_architectures ${INTERSTATE_CUDA_ARCHITECTURES})
endif()

add_library(interstate_own INTERFACE)
target_link_libraries(interstate_own INTERFACE interstate::interstate)
# nvcc writes line directives that -Wpedantic of its host compiler refuses.
target_compile_options(interstate_own INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
if(INTERSTATE_WERROR)
    target_compile_options(interstate_own INTERFACE
        $<$<COMPILE_LANGUAGE:CXX>:-Werror>
        $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror;-Werror=all-warnings>)
endif()

# The CUDA runtime is linked statically: these programs are built here and carried to a GPU machine.
function(interstate_own_cuda target)
    target_link_libraries(${target} PRIVATE interstate_own interstate::cuda)
    target_compile_options(${target} PRIVATE $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${INTERSTATE_NVCC_OFC}>>:-Ofc=max>)
    set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${interstate_cuda_architectures}"
                                               CUDA_RUNTIME_LIBRARY Static)
endfunction()

option(INTERSTATE_TEST_REFERENCES "Build the references' own tests, beside those of kernels, which run the references too" ON)

# What `ctest -L unit` needs; the sanitizers build no more than this.
add_custom_target(unit_tests)

# Idle OpenMP threads sleep instead of spinning: tests run beside each other on few cores.
set(interstate_test_environment OMP_WAIT_POLICY=passive)

# interstate_add_gtest(<target> PREFIX <name> LABELS <labels> SOURCES <files> [LINK <targets>])
# One ctest test a GoogleTest case, named PREFIX.Suite.Case.
function(interstate_add_gtest target)
    cmake_parse_arguments(PARSE_ARGV 1 arg "" "PREFIX" "LABELS;SOURCES;LINK")
    add_executable(${target})
    foreach(source IN LISTS arg_SOURCES)
        target_sources(${target} PRIVATE "${PROJECT_SOURCE_DIR}/${source}")
    endforeach()
    target_link_libraries(${target} PRIVATE interstate_own GTest::gtest GTest::gtest_main ${arg_LINK})
    target_compile_definitions(${target} PRIVATE
        INTERSTATE_GOLDEN_DIR="${PROJECT_SOURCE_DIR}/tests/golden")
    add_dependencies(unit_tests ${target})
    gtest_discover_tests(${target} TEST_PREFIX ${arg_PREFIX}. DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
        PROPERTIES LABELS "unit;${arg_LABELS}" TIMEOUT 600 ENVIRONMENT "${interstate_test_environment}")
endfunction()

# The target of cuFFT, empty where there is none: static where the toolkit has it, so that programs can be carried.
# The library without callbacks, because the other one needs a device link.
function(interstate_find_cufft out)
    set(${out} "" PARENT_SCOPE)
    foreach(target IN ITEMS CUDA::cufft_static_nocallback CUDA::cufft)
        if(TARGET ${target})
            set(${out} ${target} PARENT_SCOPE)
            return()
        endif()
    endforeach()
endfunction()

# interstate_add_cuda_test(<operator> <source> [PART <name>] [CUFFT])
# CUDA tests are plain programs (the GPU machine has no GoogleTest); 77 says that there is no device. PART is part of
# the names of a second test of an operator; CUFFT links cuFFT. tools/gpu_check.sh finds targets by their *_cuda_test.
function(interstate_add_cuda_test operator source)
    cmake_parse_arguments(PARSE_ARGV 2 arg "CUFFT" "PART" "")
    set(name ${operator}.cuda)
    set(target ${operator}_cuda_test)
    if(arg_PART)
        set(name ${operator}.cuda.${arg_PART})
        set(target ${operator}_${arg_PART}_cuda_test)
    endif()
    set(cufft "")
    if(NOT INTERSTATE_HAVE_CUDA)
        interstate_add_skipped_test(${name} "no CUDA compiler (INTERSTATE_CUDA is ${INTERSTATE_CUDA})"
                                    "cuda;${operator}")
        return()
    endif()
    if(arg_CUFFT)
        interstate_find_cufft(cufft)
        if(NOT cufft)
            interstate_add_skipped_test(${name} "the CUDA toolkit has no cuFFT" "cuda;${operator}")
            return()
        endif()
    endif()
    add_executable(${target} ${source})
    interstate_own_cuda(${target})
    target_link_libraries(${target} PRIVATE ${cufft})
    add_test(NAME ${name} COMMAND ${target})
    set_tests_properties(${name} PROPERTIES LABELS "cuda;${operator}" SKIP_RETURN_CODE 77 TIMEOUT 600
                                            RESOURCE_LOCK gpu)
endfunction()

# A test that cannot be built here is still counted, as skipped, and says why.
function(interstate_add_skipped_test name reason labels)
    add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} -E echo "skipped: ${reason}")
    set_tests_properties(${name} PROPERTIES LABELS "${labels}" SKIP_REGULAR_EXPRESSION "^skipped: ")
endfunction()

# interstate_add_script_test(<name> <script> <target> <label>)
# A bash script that drives one of our programs, whose path is its first argument.
function(interstate_add_script_test name script target label)
    add_test(NAME ${name} COMMAND bash "${PROJECT_SOURCE_DIR}/${script}" $<TARGET_FILE:${target}>
             WORKING_DIRECTORY "${PROJECT_SOURCE_DIR}")
    set_tests_properties(${name} PROPERTIES LABELS ${label} SKIP_RETURN_CODE 77 TIMEOUT 600
                                            ENVIRONMENT "${interstate_test_environment}")
    if(label STREQUAL "unit")
        add_dependencies(unit_tests ${target})
    endif()
endfunction()

# Finds out whether there is CUDA to build with (INTERSTATE_HAVE_CUDA), and makes interstate::cuda if there is.
#
# INTERSTATE_CUDA: AUTO takes nvcc where there is one, ON requires it, OFF leaves it alone. As a
# subproject, AUTO takes CUDA only where the project around has enabled it. Nothing is ever installed.
# (Not a function: a language can be enabled at file scope only.)

set(INTERSTATE_HAVE_CUDA FALSE)

if(PROJECT_IS_TOP_LEVEL AND NOT INTERSTATE_CUDA STREQUAL "OFF")
    if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
        # The toolkit's installer does not put nvcc on the PATH.
        find_program(INTERSTATE_NVCC nvcc HINTS ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
        mark_as_advanced(INTERSTATE_NVCC)
        if(INTERSTATE_NVCC)
            set(ENV{CUDACXX} "${INTERSTATE_NVCC}")
        endif()
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
        enable_language(CUDA)
    endif()
endif()

if(INTERSTATE_CUDA STREQUAL "ON" OR (INTERSTATE_CUDA STREQUAL "AUTO" AND CMAKE_CUDA_COMPILER))
    find_package(CUDAToolkit QUIET)
    if(CUDAToolkit_FOUND AND (CMAKE_CUDA_COMPILER OR NOT PROJECT_IS_TOP_LEVEL))
        add_library(interstate_cuda INTERFACE)
        add_library(interstate::cuda ALIAS interstate_cuda)
        interstate_link_cuda(interstate_cuda interstate::interstate)
        set(INTERSTATE_HAVE_CUDA TRUE)
    elseif(INTERSTATE_CUDA STREQUAL "ON")
        message(FATAL_ERROR "INTERSTATE_CUDA is ON, but there is no working nvcc. Put it on the PATH, set "
                            "CMAKE_CUDA_COMPILER, or leave INTERSTATE_CUDA at AUTO to build without CUDA.")
    endif()
endif()
if(PROJECT_IS_TOP_LEVEL AND INTERSTATE_CUDA STREQUAL "AUTO" AND NOT INTERSTATE_HAVE_CUDA)
    message(STATUS "Interstate: no CUDA compiler found; building without CUDA")
endif()

# What the interface targets stand on. The build tree and the installed package both use this file:
# headers have no build to remember choices from, so a user's machine decides for itself.
#
# INTERSTATE_OPENMP, INTERSTATE_EIGEN: AUTO links it where it is found, ON requires it, OFF leaves it alone.

# Links OpenMP and Eigen to an interface target; `missing` becomes the list of those that are required
# (ON) and not there.
function(interstate_link_dependencies target missing)
    set(absent "")

    if(NOT INTERSTATE_OPENMP STREQUAL "OFF")
        find_package(OpenMP QUIET COMPONENTS CXX)
        if(OpenMP_CXX_FOUND)
            # BUILD_INTERFACE keeps it out of the exported target: the package links it anew.
            target_link_libraries(${target} INTERFACE $<BUILD_INTERFACE:OpenMP::OpenMP_CXX>)
        elseif(INTERSTATE_OPENMP STREQUAL "ON")
            list(APPEND absent "OpenMP (INTERSTATE_OPENMP is ON)")
        endif()
    endif()

    # Only s4d/init.hpp and other initialisations include Eigen.
    if(NOT INTERSTATE_EIGEN STREQUAL "OFF")
        find_package(Eigen3 QUIET CONFIG)
        if(TARGET Eigen3::Eigen)
            target_link_libraries(${target} INTERFACE $<BUILD_INTERFACE:Eigen3::Eigen>)
        elseif(INTERSTATE_EIGEN STREQUAL "ON")
            list(APPEND absent "Eigen (INTERSTATE_EIGEN is ON)")
        endif()
    endif()

    set(${missing} "${absent}" PARENT_SCOPE)
endfunction()

# Makes `target` what a CUDA target links: `base`, the toolkit's headers (CCCL among them), C++20 for
# CUDA, and INTERSTATE_HAS_SM90A=1 where the CUDA_ARCHITECTURES of the target that links it hold 90a.
# The host pass of nvcc cannot tell 90 from 90a, so the build has to say it. Who passes -gencode flags by
# hand defines the macro by hand too. No architecture is forced on anybody.
function(interstate_link_cuda target base)
    target_link_libraries(${target} INTERFACE ${base})
    foreach(directory IN LISTS CUDAToolkit_INCLUDE_DIRS)
        target_include_directories(${target} SYSTEM INTERFACE "${directory}")
        if(EXISTS "${directory}/cccl")  # CUDA 13 keeps CUB, Thrust and libcu++ there
            target_include_directories(${target} SYSTEM INTERFACE "${directory}/cccl")
        endif()
    endforeach()
    if("cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
        target_compile_features(${target} INTERFACE cuda_std_20)
    else()  # CMake before 3.26 does not know that nvcc has C++20
        target_compile_options(${target} INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    endif()
    set(architectures "$<TARGET_PROPERTY:CUDA_ARCHITECTURES>")
    set(has_90a "$<IN_LIST:90a,${architectures}>,$<IN_LIST:90a-real,${architectures}>")
    string(APPEND has_90a ",$<IN_LIST:90a-virtual,${architectures}>")
    target_compile_definitions(${target} INTERFACE "$<$<OR:${has_90a}>:INTERSTATE_HAS_SM90A=1>")
endfunction()

# Installs into an empty prefix, and checks what arrived there.
file(REMOVE_RECURSE "${PREFIX}")
execute_process(COMMAND ${CMAKE_COMMAND} --install ${BUILD} --prefix ${PREFIX} COMMAND_ERROR_IS_FATAL ANY
                OUTPUT_QUIET)
foreach(file IN ITEMS include/interstate-0/interstate/config.hpp include/interstate-0/interstate/all.hpp
                      include/interstate-0/s4d/s4d.cuh share/cmake/interstate-0/interstateConfig.cmake)
    if(NOT EXISTS "${PREFIX}/${file}")
        message(FATAL_ERROR "${file} was not installed")
    endif()
endforeach()
file(GLOB strangers RELATIVE "${PREFIX}/include" "${PREFIX}/include/*")
if(NOT strangers STREQUAL "interstate-0")
    message(FATAL_ERROR "include/ holds '${strangers}', must hold interstate-0 only")
endif()

# The version is written once, in include/interstate/config.hpp.

function(interstate_read_version out)
    file(STRINGS "${CMAKE_CURRENT_SOURCE_DIR}/include/interstate/config.hpp" lines
         REGEX "^#define INTERSTATE_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
    set(version "")
    foreach(part IN ITEMS MAJOR MINOR PATCH)
        if(NOT "${lines}" MATCHES "INTERSTATE_VERSION_${part} ([0-9]+)")
            message(FATAL_ERROR "include/interstate/config.hpp does not define INTERSTATE_VERSION_${part}")
        endif()
        list(APPEND version ${CMAKE_MATCH_1})
    endforeach()
    list(JOIN version "." version)
    set(${out} ${version} PARENT_SCOPE)
endfunction()

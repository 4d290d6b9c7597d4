# Headers under include/interstate-<major>/, so that `s4d/` cannot collide with anybody's and two major
# versions can be installed side by side. Nothing depends on the machine: the package lives in share/.

include(CMakePackageConfigHelpers)

set(package_directory ${CMAKE_INSTALL_DATADIR}/cmake/interstate-${PROJECT_VERSION_MAJOR})

install(DIRECTORY include/ DESTINATION ${INTERSTATE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
install(TARGETS interstate EXPORT interstateTargets)
install(EXPORT interstateTargets NAMESPACE interstate:: DESTINATION ${package_directory})

configure_package_config_file(cmake/interstateConfig.cmake.in interstateConfig.cmake
                              INSTALL_DESTINATION ${package_directory})
# Before 1.0 a minor version may change what compiles.
write_basic_package_version_file(interstateConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/interstateConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/interstateConfigVersion.cmake
              cmake/InterstateDependencies.cmake
        DESTINATION ${package_directory})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/interstate-${PROJECT_VERSION_MAJOR})

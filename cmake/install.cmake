# `cmake --install` gives include/quire, the library and a package that find_package(quire) finds.
include(CMakePackageConfigHelpers)

set(quire_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/quire)
if(BUILD_SHARED_LIBS)
  set(quire_is_static OFF)
else()
  set(quire_is_static ON)
endif()
install(TARGETS quire EXPORT quireTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/quire DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN "*.h" PATTERN "cli.h" EXCLUDE)
install(EXPORT quireTargets NAMESPACE quire:: DESTINATION ${quire_cmake_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/quireConfig.cmake.in
  ${PROJECT_BINARY_DIR}/quireConfig.cmake INSTALL_DESTINATION ${quire_cmake_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/quireConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/quireConfig.cmake ${PROJECT_BINARY_DIR}/quireConfigVersion.cmake
  DESTINATION ${quire_cmake_dir})
if(TARGET quire_tool)
  install(TARGETS quire_tool RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

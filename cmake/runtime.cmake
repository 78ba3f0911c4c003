# The runtime (csrc/runtime): a shared and a static library behind include/bop2nd_runtime.h, and what installs them.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

file(STRINGS ${PROJECT_SOURCE_DIR}/bop2nd_fast/__init__.py version_line REGEX "^__version__")
string(REGEX MATCH "[0-9]+[.][0-9]+[.][0-9]+" BOP2ND_VERSION "${version_line}")

file(GLOB runtime_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/runtime/*.cpp)
add_library(bop2nd_runtime_objects OBJECT ${runtime_sources})
target_compile_definitions(bop2nd_runtime_objects PRIVATE BOP2ND_VERSION="${BOP2ND_VERSION}")
# Small before fast: what is called for every number is in csrc/cpu.
target_compile_options(bop2nd_runtime_objects PRIVATE -Os -fvisibility=hidden -fvisibility-inlines-hidden
                                                      -ffunction-sections -fdata-sections)

add_library(bop2nd_runtime SHARED $<TARGET_OBJECTS:bop2nd_runtime_objects> $<TARGET_OBJECTS:bop2nd_core>)
add_library(bop2nd_runtime_static STATIC $<TARGET_OBJECTS:bop2nd_runtime_objects> $<TARGET_OBJECTS:bop2nd_core>)
set_target_properties(bop2nd_runtime PROPERTIES VERSION ${BOP2ND_VERSION} SOVERSION 0 EXPORT_NAME runtime)
set_target_properties(bop2nd_runtime_static PROPERTIES OUTPUT_NAME bop2nd_runtime EXPORT_NAME runtime_static)
set(version_script ${PROJECT_SOURCE_DIR}/cmake/bop2nd_runtime.map)
# What nothing of the interface reaches, the loops of training for one, is left out.
target_link_options(bop2nd_runtime PRIVATE -Wl,--version-script=${version_script} -Wl,--gc-sections)
set_target_properties(bop2nd_runtime PROPERTIES LINK_DEPENDS ${version_script})
foreach(library bop2nd_runtime bop2nd_runtime_static)
  target_link_libraries(${library} PUBLIC Threads::Threads)
  target_include_directories(${library} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                                               $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
endforeach()

if(NOT CMAKE_CROSSCOMPILING)
  enable_language(C)
  add_executable(predict EXCLUDE_FROM_ALL ${PROJECT_SOURCE_DIR}/examples/c/predict.c)
  target_link_libraries(predict PRIVATE bop2nd_runtime)
endif()

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/bop2nd)
install(TARGETS bop2nd_runtime bop2nd_runtime_static EXPORT bop2nd_targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${PROJECT_SOURCE_DIR}/include/bop2nd_runtime.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT bop2nd_targets NAMESPACE bop2nd:: FILE bop2nd-targets.cmake DESTINATION ${package_folder})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/bop2nd-config.cmake.in bop2nd-config.cmake
  INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(bop2nd-config-version.cmake VERSION ${BOP2ND_VERSION} COMPATIBILITY SameMinorVersion)
# Relative: `cmake --install --prefix` may name another folder than the configuration did.
file(RELATIVE_PATH pc_to_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(${PROJECT_SOURCE_DIR}/cmake/bop2nd.pc.in bop2nd.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/bop2nd-config.cmake ${PROJECT_BINARY_DIR}/bop2nd-config-version.cmake
  DESTINATION ${package_folder})
install(FILES ${PROJECT_BINARY_DIR}/bop2nd.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

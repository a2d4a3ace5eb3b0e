# The library, its headers and the CMake package headwise::headwise, for find_package(headwise).
# A wheel holds the library alone, below headwise/lib, and finds torch beside headwise.

if(SKBUILD)
  set_target_properties(headwise PROPERTIES INSTALL_RPATH "$ORIGIN/../../torch/lib")
  install(TARGETS headwise LIBRARY DESTINATION headwise/lib)
  return()
endif()

# torch by name: INSTALL_RPATH_USE_LINK_PATH leaves out what lies inside the source tree, as .venv does.
set(HEADWISE_INSTALL_RPATH "$ORIGIN" "${TORCH_INSTALL_PREFIX}/lib")
if(HEADWISE_CUDA)
  list(APPEND HEADWISE_INSTALL_RPATH "${CUDAToolkit_LIBRARY_DIR}")
endif()
set_target_properties(headwise PROPERTIES
  INSTALL_RPATH "${HEADWISE_INSTALL_RPATH}" INSTALL_RPATH_USE_LINK_PATH ON)
install(TARGETS headwise EXPORT headwiseTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/headwise" "${PROJECT_BINARY_DIR}/include/headwise"
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")

set(HEADWISE_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/headwise)
install(EXPORT headwiseTargets NAMESPACE headwise:: DESTINATION ${HEADWISE_CMAKE_DIR})
string(REGEX MATCH "^[0-9]+\\.[0-9]+" HEADWISE_TORCH_MINOR_REGEX "${Torch_VERSION}")
string(REPLACE "." "\\\\." HEADWISE_TORCH_MINOR_REGEX "${HEADWISE_TORCH_MINOR_REGEX}")
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/cmake/headwiseConfig.cmake.in"
  "${CMAKE_CURRENT_BINARY_DIR}/headwiseConfig.cmake" INSTALL_DESTINATION ${HEADWISE_CMAKE_DIR})
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/headwiseConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES
  "${CMAKE_CURRENT_BINARY_DIR}/headwiseConfig.cmake"
  "${CMAKE_CURRENT_BINARY_DIR}/headwiseConfigVersion.cmake"
  "${CMAKE_CURRENT_LIST_DIR}/cmake/HeadwiseTorch.cmake"
  DESTINATION ${HEADWISE_CMAKE_DIR})

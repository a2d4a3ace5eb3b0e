# Header-only and test dependencies. Each is found as a package or as plain headers; failing that it
# is downloaded (pinned by its hash); failing that, one sentence says how to install it.
#
#   headwise_need_eigen()       -> Eigen3::Eigen
#   headwise_need_json()        -> nlohmann_json::nlohmann_json
#   headwise_need_googletest()  -> GTest::gtest_main
#
# HEADWISE_DEPS is a folder that carries them to a machine without network: include/eigen3,
# include/nlohmann and src/googletest (`make gpu-deps` fills one).

set(HEADWISE_DEPS "${PROJECT_SOURCE_DIR}/.deps" CACHE PATH "Folder with dependencies brought along")
option(HEADWISE_DOWNLOAD "Download dependencies that are not installed" ON)
include(FetchContent)

# Downloads an archive and unpacks it; sets <name>_SOURCE_DIR in the caller.
function(headwise_download name url sha256 remedy)
  set(archive "${PROJECT_BINARY_DIR}/_deps/${name}-archive")
  set(status "1;downloads are off (HEADWISE_DOWNLOAD)")
  if(HEADWISE_DOWNLOAD)
    message(STATUS "headwise: ${name} is not installed; downloading it")
    file(DOWNLOAD "${url}" "${archive}" STATUS status INACTIVITY_TIMEOUT 30)
    if(status MATCHES "^0")
      file(SHA256 "${archive}" found)
      if(NOT found STREQUAL sha256)
        set(status "1;the archive has another hash than expected")
      endif()
    endif()
  endif()
  if(NOT status MATCHES "^0")
    list(GET status 1 reason)
    file(REMOVE "${archive}")
    message(FATAL_ERROR "headwise needs ${name}, which is not installed and could not be downloaded "
                        "(${reason}). Install it: ${remedy}")
  endif()
  FetchContent_Declare(${name} URL "${archive}" DOWNLOAD_EXTRACT_TIMESTAMP ON
    SOURCE_SUBDIR .headers-only)  # no CMakeLists.txt there: unpacked, not added
  FetchContent_MakeAvailable(${name})
  set(${name}_SOURCE_DIR "${${name}_SOURCE_DIR}" PARENT_SCOPE)
endfunction()

# A header-only target of our own, for headers that came without a CMake package.
function(headwise_header_target target directory)
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${directory}")
endfunction()

macro(headwise_need_eigen)
  if(NOT TARGET Eigen3::Eigen)
    find_package(Eigen3 CONFIG QUIET)
  endif()
  if(NOT TARGET Eigen3::Eigen)
    find_path(HEADWISE_EIGEN_INCLUDE Eigen/Core HINTS "${HEADWISE_DEPS}/include" PATH_SUFFIXES eigen3)
    if(NOT HEADWISE_EIGEN_INCLUDE)
      headwise_download(eigen
        https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz
        8586084f71f9bde545ee7fa6d00288b264a2b7ac3607b974e54d13e7162c1c72
        "apt-get install libeigen3-dev")
      set(HEADWISE_EIGEN_INCLUDE "${eigen_SOURCE_DIR}")
    endif()
    headwise_header_target(Eigen3::Eigen "${HEADWISE_EIGEN_INCLUDE}")
  endif()
endmacro()

macro(headwise_need_json)
  if(NOT TARGET nlohmann_json::nlohmann_json)
    find_package(nlohmann_json CONFIG QUIET)
  endif()
  if(NOT TARGET nlohmann_json::nlohmann_json)
    # The wheel nlohmann-json holds the headers, without a CMake package.
    set(headwise_wheel "")
    find_package(Python COMPONENTS Interpreter QUIET)
    if(Python_Interpreter_FOUND)
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
                "import importlib.util as u; print(u.find_spec('nlohmann_json').submodule_search_locations[0])"
        OUTPUT_VARIABLE headwise_wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
    find_path(HEADWISE_JSON_INCLUDE nlohmann/json.hpp
      HINTS "${HEADWISE_DEPS}/include" "${headwise_wheel}/include")
    if(NOT HEADWISE_JSON_INCLUDE)
      headwise_download(nlohmann_json
        https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
        d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d
        "pip install nlohmann-json")
      set(HEADWISE_JSON_INCLUDE "${nlohmann_json_SOURCE_DIR}/include")
    endif()
    headwise_header_target(nlohmann_json::nlohmann_json "${HEADWISE_JSON_INCLUDE}")
  endif()
endmacro()

macro(headwise_need_googletest)
  if(NOT TARGET GTest::gtest_main)
    find_package(GTest QUIET)
  endif()
  if(NOT TARGET GTest::gtest_main)
    find_path(HEADWISE_GOOGLETEST_SOURCE googletest/src/gtest-all.cc NO_CMAKE_SYSTEM_PATH
      HINTS "${HEADWISE_DEPS}/src/googletest" /usr/src/googletest)
    if(NOT HEADWISE_GOOGLETEST_SOURCE)
      headwise_download(googletest
        https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz
        8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7
        "apt-get install libgtest-dev (or pass -DHEADWISE_TESTS=OFF)")
      set(HEADWISE_GOOGLETEST_SOURCE "${googletest_SOURCE_DIR}")
    endif()
    set(INSTALL_GTEST OFF)
    set(BUILD_GMOCK OFF)
    add_subdirectory("${HEADWISE_GOOGLETEST_SOURCE}" "${PROJECT_BINARY_DIR}/_deps/googletest-build"
      EXCLUDE_FROM_ALL SYSTEM)
    if(NOT TARGET GTest::gtest_main)
      add_library(GTest::gtest_main ALIAS gtest_main)
    endif()
  endif()
endmacro()

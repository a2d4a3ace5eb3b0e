# LibTorch: where it is, and finding it without a CUDA toolkit. Installed with the library, for its
# package file has the same work to do.

# headwise_locate_torch() sets, without loading anything of torch:
#   HEADWISE_TORCH_DIR   the folder of TorchConfig.cmake
#   HEADWISE_TORCH_CUDA  the CUDA version that torch was built with ("13.0"); empty for a CPU build
# Looked for in Torch_DIR, Torch_ROOT and CMAKE_PREFIX_PATH, then in the torch wheel of Python
# (an active virtual environment first). An isolated build of pip hides the packages of the
# environment from import, but its folder is the one to build against all the same.
function(headwise_locate_torch)
  set(wheel "")
  if(NOT Torch_DIR)
    find_package(Python COMPONENTS Interpreter QUIET)
    if(Python_Interpreter_FOUND)
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c [=[
import importlib.util, os, sysconfig
torch = importlib.util.find_spec("torch")
print(torch.submodule_search_locations[0] if torch
      else os.path.join(sysconfig.get_path("platlib"), "torch"))]=]
        OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endif()
  unset(directory)
  find_path(directory TorchConfig.cmake NO_CACHE
    HINTS "${Torch_DIR}" "${Torch_ROOT}"
    PATHS "${wheel}"
    PATH_SUFFIXES Torch share/cmake/Torch)
  if(NOT directory)
    set(directory "")
  endif()

  cmake_path(SET root NORMALIZE "${directory}/../../..")
  set(cuda "")
  if(EXISTS "${root}/version.py")
    file(STRINGS "${root}/version.py" line REGEX "^cuda[ :].*'[0-9.]+'")
    if(line MATCHES "'([0-9.]+)'")
      set(cuda "${CMAKE_MATCH_1}")
    endif()
  elseif(EXISTS "${root}/build-version")  # the zip file of LibTorch: "2.11.0+cu130"
    file(STRINGS "${root}/build-version" line LIMIT_COUNT 1)
    if(line MATCHES "\\+cu([0-9]+)([0-9])$")
      set(cuda "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    endif()
  endif()
  set(HEADWISE_TORCH_DIR "${directory}" PARENT_SCOPE)
  set(HEADWISE_TORCH_CUDA "${cuda}" PARENT_SCOPE)
endfunction()

# find_package(Torch), whether or not there is a CUDA toolkit. A macro, because the targets and the
# variables of torch belong to the caller's scope.
macro(headwise_find_torch)
  if(NOT TARGET torch)
    if(NOT HEADWISE_TORCH_DIR)
      message(FATAL_ERROR
        "headwise needs LibTorch and found none. Install the torch package into the Python in use "
        "(pip install torch), or pass -DCMAKE_PREFIX_PATH=<folder of libtorch>.")
    endif()
    if(NOT CMAKE_CUDA_COMPILER_LOADED AND NOT TARGET torch::cudart)
      # The package file of a CUDA build of torch stops without a CUDA toolkit (and, with a toolkit
      # but no GPU, asks nvcc for architectures that it no longer knows), although nothing of CUDA
      # is needed to link against the CPU side. It leaves CUDA alone when this target is there.
      add_library(torch::cudart INTERFACE IMPORTED)
    endif()
    find_package(Torch REQUIRED PATHS "${HEADWISE_TORCH_DIR}" NO_DEFAULT_PATH)
    if(NOT CMAKE_CUDA_FLAGS STREQUAL "")
      # Torch writes its own list of architectures into the flags of every CUDA file; here each
      # source names its own (headwise_cuda_sources).
      string(REGEX REPLACE "-gencode[ =][^ ]+" "" CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS}")
    endif()
  endif()
endmacro()

headwise_locate_torch()

# The OpenMP that LibTorch runs on, for a target that calls at::parallel_for: a template, which
# without the compiler's flags for OpenMP runs on one thread and says nothing. LibTorch brings its
# runtime along; another one would have threads of its own.
function(headwise_use_openmp target)
  # The module tries every language that is on, and for CUDA fails where architectures are set per
  # source, as here; a result that stands is not looked for.
  set(OpenMP_CUDA_FLAGS "")
  set(OpenMP_CUDA_LIB_NAMES "")
  find_package(OpenMP COMPONENTS CXX)
  if(NOT OpenMP_CXX_FOUND)
    message(WARNING "headwise found no OpenMP: its CPU kernels will run on one thread.")
    target_compile_definitions(${target} PRIVATE HEADWISE_SERIAL)
    return()
  endif()
  separate_arguments(flags NATIVE_COMMAND "${OpenMP_CXX_FLAGS}")
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${flags}>")
  cmake_path(SET root NORMALIZE "${HEADWISE_TORCH_DIR}/../../..")
  file(GLOB runtime "${root}/lib/libgomp*.so*" "${root}/../torch.libs/libgomp*.so*")
  if(runtime AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(GET runtime 0 runtime)
    target_link_libraries(${target} PRIVATE "${runtime}")
  else()
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  endif()
endfunction()

# CUDA: whether it can be compiled here, and for which architectures each source is.
#
# HEADWISE_CUDA_DEFAULT  ON where nvcc is found and belongs to the CUDA that torch was built with.
# headwise_enable_cuda() turns the language on, before torch is looked for.
# headwise_cuda_sources(TARGET [ARCHITECTURES a...] SOURCES f.cu...) adds CUDA sources to a target.

find_program(HEADWISE_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" /usr/local/cuda/bin
  DOC "The CUDA compiler")
mark_as_advanced(HEADWISE_NVCC)
set(HEADWISE_CUDA_ARCHITECTURES "" CACHE STRING
  "Compile CUDA sources for these only, e.g. 90a-real or 120-real (empty: 80-real 90a-real 80-virtual)")

set(HEADWISE_CUDA_DEFAULT OFF)
if(HEADWISE_NVCC)
  execute_process(COMMAND "${HEADWISE_NVCC}" --version OUTPUT_VARIABLE HEADWISE_NVCC_VERSION ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" HEADWISE_NVCC_VERSION "${HEADWISE_NVCC_VERSION}")
  set(HEADWISE_NVCC_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  string(REGEX MATCH "^[0-9]+" HEADWISE_TORCH_CUDA_MAJOR "${HEADWISE_TORCH_CUDA}")
  if(NOT HEADWISE_TORCH_CUDA)
    message(STATUS "headwise: no CUDA kernels: torch is a build for the CPU")
  elseif(NOT CMAKE_MATCH_0 STREQUAL "" AND HEADWISE_NVCC_VERSION MATCHES "^${HEADWISE_TORCH_CUDA_MAJOR}\\.")
    set(HEADWISE_CUDA_DEFAULT ON)
  else()
    message(STATUS "headwise: no CUDA kernels: ${HEADWISE_NVCC} is of CUDA ${HEADWISE_NVCC_VERSION}, "
                   "torch of CUDA ${HEADWISE_TORCH_CUDA}")
  endif()
else()
  message(STATUS "headwise: no CUDA kernels: nvcc was not found")
endif()

macro(headwise_enable_cuda)
  if(NOT HEADWISE_NVCC)
    message(FATAL_ERROR "HEADWISE_CUDA is ON, but nvcc was not found: put it on PATH, set CUDA_HOME, "
                        "or pass -DHEADWISE_CUDA=OFF.")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "${HEADWISE_NVCC}")
  endif()
  # Torch looks for the toolkit by its own means; both must find the same one.
  cmake_path(GET HEADWISE_NVCC PARENT_PATH HEADWISE_CUDA_ROOT)
  cmake_path(GET HEADWISE_CUDA_ROOT PARENT_PATH HEADWISE_CUDA_ROOT)
  set(CUDA_TOOLKIT_ROOT_DIR "${HEADWISE_CUDA_ROOT}" CACHE PATH "The CUDA toolkit")
  # Only to keep torch from detecting: without a GPU it would list architectures that nvcc 13
  # refuses. What is compiled is said by headwise_cuda_sources().
  if(NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT TORCH_CUDA_ARCH_LIST)
    set(TORCH_CUDA_ARCH_LIST "8.0;9.0a")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  enable_language(CUDA)
  unset(CMAKE_CUDA_ARCHITECTURES)  # torch warns about it; each source has its own flags
  find_package(CUDAToolkit REQUIRED)
endmacro()

# Adds CUDA sources to a target and sets for which architectures they are compiled, in CMake's
# words: 80-real is machine code for sm_80 (and 8.6, 8.9), 90a-real for sm_90a (wgmma), 80-virtual is
# PTX, which the driver compiles for any later GPU when a kernel is first launched. The default
# covers Ampere, Hopper, and what follows; HEADWISE_CUDA_ARCHITECTURES replaces it.
# A source that only Hopper can run says ARCHITECTURES 90a-real: those of the list that it runs on.
#
#   headwise_cuda_sources(headwise SOURCES kernels/cuda/select_heads.cu)
#   headwise_cuda_sources(headwise ARCHITECTURES 90a-real SOURCES kernels/cuda/attention_sm90.cu)
#
# Sets HEADWISE_CUDA_CODE to what was chosen for a source that all run, as
# kernels/cuda/architectures.h reads it.
function(headwise_cuda_sources target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "ARCHITECTURES;SOURCES")
  set(chosen ${HEADWISE_CUDA_ARCHITECTURES})
  if(arg_ARCHITECTURES)
    list(JOIN arg_ARCHITECTURES "|" runs)
    list(FILTER chosen INCLUDE REGEX "^(${runs})$")
    if(NOT chosen)
      set(chosen ${arg_ARCHITECTURES})
    endif()
  elseif(NOT chosen)
    set(chosen 80-real 90a-real 80-virtual)
  endif()
  set(flags "")
  foreach(architecture IN LISTS chosen)
    if(NOT architecture MATCHES "^([0-9]+)([af]?)-(real|virtual)$" OR CMAKE_MATCH_1 LESS 80)
      message(FATAL_ERROR "HEADWISE_CUDA_ARCHITECTURES: an architecture is written 80-real, 90a-real "
                          "or 80-virtual, and is 80 or later; got '${architecture}'.")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    if(number STREQUAL "90")  # warpgroups_run() takes code for 9.0 to hold warpgroup products
      message(FATAL_ERROR "HEADWISE_CUDA_ARCHITECTURES: compute capability 9.0 is written 90a, got "
                          "'${architecture}'.")
    endif()
    set(code "sm_${number}")
    if(CMAKE_MATCH_3 STREQUAL "virtual")
      set(code "compute_${number}")
    endif()
    list(APPEND flags "-gencode=arch=compute_${number},code=${code}")
  endforeach()
  set_source_files_properties(${arg_SOURCES} PROPERTIES COMPILE_OPTIONS "${flags}")
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF)
  target_sources(${target} PRIVATE ${arg_SOURCES})
  if(NOT arg_ARCHITECTURES)
    list(JOIN chosen " " words)
    set(HEADWISE_CUDA_CODE "${words}" PARENT_SCOPE)
  endif()
endfunction()

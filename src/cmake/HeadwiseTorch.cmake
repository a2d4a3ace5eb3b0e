# Finds LibTorch (from the torch wheel of the active Python, unless CMAKE_PREFIX_PATH says otherwise).

if(NOT Torch_DIR AND NOT Torch_ROOT)
  find_package(Python COMPONENTS Interpreter QUIET)
  if(Python_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import torch; print(torch.utils.cmake_prefix_path)"
      OUTPUT_VARIABLE HEADWISE_TORCH_PREFIX OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND CMAKE_PREFIX_PATH "${HEADWISE_TORCH_PREFIX}")
  endif()
endif()

if(HEADWISE_CUDA)
  # Without a GPU torch would detect an architecture list that nvcc 13 refuses; ours is set per
  # target instead. Torch ignores CMAKE_CUDA_ARCHITECTURES.
  if(NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT TORCH_CUDA_ARCH_LIST)
    set(TORCH_CUDA_ARCH_LIST "8.0;9.0a")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "${HEADWISE_NVCC}")
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
elseif(NOT TARGET torch::cudart)
  # A CUDA build of torch refuses to configure without a CUDA toolkit, though nothing of CUDA is
  # needed to link against its CPU side: an empty stand-in steps past that check.
  add_library(torch::cudart INTERFACE IMPORTED)
endif()
find_package(Torch REQUIRED)

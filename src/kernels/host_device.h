// Index logic that the CUDA kernels and the host share is written once, in functions marked with
// this macro, so that a machine without a GPU tests the very code that the device runs.
#pragma once

#ifdef __CUDACC__
#define HEADWISE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HEADWISE_HOST_DEVICE inline
#endif

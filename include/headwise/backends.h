// Implementations that can execute a selection here, and why the others cannot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "headwise/export.h"

namespace headwise {

struct Backend {
  std::string name;
  std::string device;  ///< "cuda" or "cpu"
  bool available;      ///< can run on this machine, with this build
  std::string reason;  ///< why it cannot, or a remark
};

/// Every backend of the attention operators, for each device the fastest first: the order in which
/// they are tried.
HEADWISE_API std::vector<Backend> backends();

/// Implementation of the attention of the chosen pairs on a CUDA device: headwise's kernels, or
/// LibTorch's FlashAttention where it applies (docs/backends.md).
enum class CudaAttention : uint8_t { kernels, flash };
/// Implementation of matrix products on a CUDA device: warps, or on Hopper whole warpgroups.
enum class CudaProducts : uint8_t { warps, warpgroups };
struct CudaRoutes {
  CudaAttention attention = CudaAttention::kernels;
  CudaProducts products = CudaProducts::warps;
};

/// The routes that calls on CUDA devices take, in every thread of the process.
HEADWISE_API CudaRoutes cuda_routes();
/// Sets them for every later call. @returns the routes until now
HEADWISE_API CudaRoutes set_cuda_routes(const CudaRoutes& routes);

}  // namespace headwise

// Shared by the launchers of CUDA kernels: dtypes, the stream, errors. Only in builds with the
// kernels (HEADWISE_CUDA), for a device or for its emulation on the host.
#pragma once

#include <ATen/core/Tensor.h>
#ifndef HEADWISE_EMULATE
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <string>

#include "kernels/cuda/kernels.h"

namespace headwise::ops {

inline kernels::cuda::Element element_of(at::ScalarType type) {
  using kernels::cuda::Element;
  switch (type) {
    case at::kDouble:
      return Element::f64;
    case at::kFloat:
      return Element::f32;
    case at::kHalf:
      return Element::f16;
    case at::kBFloat16:
      return Element::bf16;
    default:
      TORCH_CHECK_TYPE(false, "expected float64, float32, bfloat16 or float16, got ", type);
  }
}

#ifdef HEADWISE_EMULATE
struct DeviceGuard {
  explicit DeviceGuard(at::Device) {}
};
inline kernels::cuda::Stream current_stream() { return nullptr; }
inline void check_launch(int error) { TORCH_CHECK(error == 0, "emulated launch failed: ", error); }
inline bool device_fits(at::Device) { return true; }
#else
using DeviceGuard = c10::cuda::CUDAGuard;
inline kernels::cuda::Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
inline void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
/// True if the device can run the kernels: compute capability 8.0 and later, and compiled for it.
bool device_fits(at::Device device);
/// Why it cannot; empty if it can.
std::string device_refusal(at::Device device);
/// Why none of the devices can; empty if one can.
std::string devices_refusal();
#endif

}  // namespace headwise::ops

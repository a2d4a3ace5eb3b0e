#include <c10/cuda/CUDAFunctions.h>

#include "kernels/cuda/architectures.h"
#include "ops/cuda/launch.h"

namespace headwise::ops {
namespace {

int capability_of(c10::DeviceIndex device) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

bool fits(int capability) {
  return capability >= kernels::cuda::kOldestDevice &&
         kernels::cuda::runs_on(HEADWISE_CUDA_CODE, capability);
}

}  // namespace

bool device_fits(at::Device device) { return fits(capability_of(device.index())); }

std::string device_refusal(at::Device device) {
  const int capability = capability_of(device.index());
  if (fits(capability)) return "";
  const auto name = c10::str(capability / 10, ".", capability % 10);
  if (capability < kernels::cuda::kOldestDevice)
    return c10::str("the device is of compute capability ", name, ", the kernels need 8.0");
  return c10::str("headwise was compiled for ", HEADWISE_CUDA_CODE,
                  ", which a device of compute capability ", name, " does not run");
}

std::string devices_refusal() {
  std::string first;
  for (c10::DeviceIndex i = 0; i < c10::cuda::device_count(); ++i) {
    const auto refusal = device_refusal(at::Device(at::kCUDA, i));
    if (refusal.empty()) return "";
    if (first.empty()) first = refusal;
  }
  return first;
}

}  // namespace headwise::ops

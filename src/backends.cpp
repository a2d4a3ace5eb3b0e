#include "headwise/backends.h"

#include <ATen/Context.h>
#include <c10/util/BFloat16.h>

#include <atomic>

#include "kernels/cpu/packed_gemm.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/launch.h"
#endif

namespace headwise {
namespace {

// Reported for every CUDA path until the GPU tests have passed on a device.
constexpr const char* kUnverified = "not yet run on a GPU";

/// Runs small products to find out: oneDNN decides which instructions they need.
Backend packed() {
  const bool single = kernels::packed_gemm_supported<float>();
  const bool half = kernels::packed_gemm_supported<c10::BFloat16>();
  std::string reason = "LibTorch's brgemm over the active heads, widths that are multiples of 8: ";
  if (single && half)
    reason += "float32 and bfloat16";
  else if (single || half)
    reason += std::string(single ? "float32" : "bfloat16") + " only on this processor";
  else
    reason = "LibTorch's brgemm does not run here";
#ifdef HEADWISE_SERIAL
  reason += "; on one thread: compiled without OpenMP";
#endif
  return {"cpu_packed", "cpu", single || half, reason};
}

std::atomic<CudaRoutes> routes;

}  // namespace

CudaRoutes cuda_routes() { return routes.load(); }
CudaRoutes set_cuda_routes(const CudaRoutes& wanted) { return routes.exchange(wanted); }

std::vector<Backend> backends() {
  // Also false if torch was built without CUDA.
  const std::string no_device = at::hasCUDA() ? "" : "torch sees no CUDA device";
  const bool device = no_device.empty();
  std::vector<Backend> list;
#ifdef HEADWISE_CUDA
  const std::string refusal = device ? ops::devices_refusal() : no_device;
  list.push_back({"cuda_kernels", "cuda", refusal.empty(),
                  (refusal.empty() ? refusal : refusal + "; ") + kUnverified +
                      ": selection, projections of the chosen heads, attention, decoding, output "
                      "projection, their gradients and attention statistics, without waiting for "
                      "the device; heads of up to 256 columns"});
#else
  list.push_back({"cuda_kernels", "cuda", false,
                  "headwise was compiled without CUDA kernels (HEADWISE_CUDA=OFF)"});
#endif
  list.push_back(
      {"aten", "cuda", device,
       (device ? std::string() : no_device + "; ") + kUnverified +
           ": LibTorch's matrix products and attention over the active heads, one head at a "
           "time, for inputs that the kernels do not support; waits for the device once per call"});
  list.push_back(packed());
  list.push_back({"cpu_kernels", "cpu", true,
                  "BLAS, or plain loops without it, over the active heads: float64, "
                  "float16, and inputs that cpu_packed cannot run"});
  return list;
}

}  // namespace headwise

#include "headwise/backends.h"

#include <ATen/Context.h>

namespace headwise {
namespace {

// Said of every CUDA path until the GPU tests have passed on a device.
constexpr const char* kUnverified = "compiled, not verified on a GPU";

}  // namespace

std::vector<Backend> backends() {
  // False, too, where torch was built without CUDA.
  const std::string no_device = at::hasCUDA() ? "" : "torch sees no CUDA device";
  const bool device = no_device.empty();
  std::vector<Backend> list;
#ifdef HEADWISE_CUDA
  list.push_back({"cuda_kernels", "cuda", device,
                  (device ? std::string() : no_device + "; ") + kUnverified +
                      ": selection, work list, gather and scatter of heads, attention statistics"});
#else
  list.push_back({"cuda_kernels", "cuda", false,
                  "headwise was compiled without CUDA kernels (HEADWISE_CUDA=OFF)"});
#endif
  list.push_back(
      {"grouped", "cuda", device,
       (device ? std::string() : no_device + "; ") + kUnverified +
           ": LibTorch's matrix products and attention over the active heads, grouped by "
           "head; waits for the device once a call"});
  list.push_back({"cpu_kernels", "cpu", true, "own kernels over the active heads"});
  return list;
}

}  // namespace headwise

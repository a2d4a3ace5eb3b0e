#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int combine(const CombineArguments& a, Stream stream) {
  return with_element(a.type, [&](auto element) {
    using Kernel = CombineKernel<decltype(element)>;
    return launch(Kernel{a}, combine_blocks(a, Kernel::kM, Kernel::kN), Kernel::kShared, stream);
  });
}

}  // namespace headwise::kernels::cuda

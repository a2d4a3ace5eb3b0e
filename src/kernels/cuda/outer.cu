#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int outer(const OuterArguments& a, Stream stream) {
  return with_element(a.type, [&](auto element) {
    using Kernel = OuterKernel<decltype(element)>;
    return launch(Kernel{a}, outer_blocks(a, Kernel::kM, Kernel::kN), Kernel::kShared, stream);
  });
}

}  // namespace headwise::kernels::cuda

#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int project(const ProjectArguments& a, Stream stream) {
  return with_element(a.type, [&](auto element) {
    using Kernel = ProjectKernel<decltype(element)>;
    return launch(Kernel{a}, project_blocks(a, Kernel::kM, Kernel::kN), Kernel::kShared, stream);
  });
}

}  // namespace headwise::kernels::cuda

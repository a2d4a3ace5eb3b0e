#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int combine(const CombineArguments& a, Stream stream) {
  return with_element(a.type, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto gemm) {
      using Kernel = CombineKernel<T, decltype(gemm)>;
      return launch(Kernel{a}, combine_blocks(a, Kernel::kM, Kernel::kN), Kernel::kShared, stream);
    };
    if constexpr (kTensorCores<T>)
      if (a.warpgroups && a.vectors && warpgroups_run<CombineKernel<T, WarpgroupGemm<T>>>())
        return run(WarpgroupGemm<T>{});
    return run(Gemm<T, 128, 128>{});
  });
}

}  // namespace headwise::kernels::cuda

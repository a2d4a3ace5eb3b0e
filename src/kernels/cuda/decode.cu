#include "kernels/cuda/decode_kernels.h"
#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int decode(const PairAttentionArguments& a, const DecodeShape& shape, void* partial,
           Stream stream) {
  return with_element(a.type, [&](auto element) {
    using T = decltype(element);
    using C = Accumulator<T>;
    const auto run = [&](auto kernel) {
      using Kernel = decltype(kernel);
      return launch(Kernel{a, shape, static_cast<C*>(partial)}, decode_blocks(a, shape),
                    Kernel::kShared, stream);
    };
    const int64_t widest = a.width > a.value_width ? a.width : a.value_width;
    int error = 0;
    if constexpr (kTensorCores<T>)
      error = widest <= 32    ? run(DecodeKernel<T, 4>{})
              : widest <= 64  ? run(DecodeKernel<T, 8>{})
              : widest <= 128 ? run(DecodeKernel<T, 16>{})
                              : run(DecodeKernel<T, 32>{});
    else
      error = run(DecodeKernel<T, 32>{});
    if (error) return error;
    using Merge = DecodeMerge<T>;
    return launch(Merge{a, shape, static_cast<const C*>(partial)},
                  a.chosen.batch * a.chosen.columns, Merge::kShared, stream);
  });
}

}  // namespace headwise::kernels::cuda

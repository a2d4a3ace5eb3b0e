#include "kernels/cuda/decode_kernels.h"
#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int decode(const PairAttentionArguments& a, const DecodeShape& shape, void* partial,
           Stream stream) {
  return with_element(a.type, [&](auto element) {
    using T = decltype(element);
    using C = Accumulator<T>;
    using Kernel = DecodeKernel<T>;
    const int error = launch(Kernel{a, shape, static_cast<C*>(partial)}, decode_blocks(a, shape),
                             Kernel::kShared, stream);
    if (error) return error;
    return launch(DecodeMerge<T>{a, shape, static_cast<const C*>(partial)},
                  a.chosen.batch * a.chosen.columns, 0, stream);
  });
}

}  // namespace headwise::kernels::cuda

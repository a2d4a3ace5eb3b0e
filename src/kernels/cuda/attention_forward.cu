#include "kernels/cuda/attention_tensor.h"
#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int attention_forward(const PairAttentionArguments& a, Stream stream) {
  const int64_t pairs = a.chosen.batch * a.chosen.columns;
  return with_element(a.type, [&](auto element) {
    using T = decltype(element);
    int error = 0;
    if constexpr (kTensorCores<T>) {
      if (with_tile(a, [&](auto tile) {
            using Kernel = TensorForward<T, decltype(tile)>;
            error = launch(Kernel{a}, pairs * tiles_of(a.queries, Kernel::kRows), Kernel::kShared,
                           stream);
          }))
        return error;
    }
    return launch(PlainForward<T>{a}, pairs * tiles_of(a.queries, kRowsAtOnce), 0, stream);
  });
}

}  // namespace headwise::kernels::cuda

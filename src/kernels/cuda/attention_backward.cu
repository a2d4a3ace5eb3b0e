#include "kernels/cuda/attention_tensor.h"
#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int attention_delta(const PairAttentionArguments& a, void* delta, void* grad_weight, bool weigh,
                    Stream stream) {
  const int64_t pairs = a.chosen.batch * a.chosen.columns;
  return with_element(a.type, [&](auto element) {
    using Kernel = DeltaKernel<decltype(element)>;
    using C = typename Kernel::C;
    const int error = launch(Kernel{a, static_cast<C*>(delta), weigh},
                             pairs * tiles_of(a.queries, kDeltaRows), 0, stream);
    if (error || !grad_weight) return error;
    using Sum = WeightGradientKernel<C>;
    return launch(Sum{a, static_cast<const C*>(delta), static_cast<C*>(grad_weight)}, pairs,
                  Sum::kShared, stream);
  });
}

int attention_backward(const PairAttentionArguments& a, Stream stream) {
  const int64_t pairs = a.chosen.batch * a.chosen.columns;
  return with_element(a.type, [&](auto element) {
    using T = decltype(element);
    int error = 0;
    if constexpr (kTensorCores<T>) {
      if (with_tile(a, [&](auto tile) {
            using Query = TensorBackwardQuery<T, decltype(tile)>;
            using Key = TensorBackwardKey<T, decltype(tile)>;
            error =
                launch(Query{a}, pairs * tiles_of(a.queries, Query::kRows), Query::kShared, stream);
            if (error == 0)
              error = launch(Key{a}, pairs * tiles_of(a.keys, Key::kKeys), Key::kShared, stream);
          }))
        return error;
    }
    error = launch(PlainBackwardQuery<T>{a}, pairs * tiles_of(a.queries, kRowsAtOnce), 0, stream);
    if (error) return error;
    return launch(PlainBackwardKey<T>{a}, pairs * tiles_of(a.keys, kRowsAtOnce), 0, stream);
  });
}

}  // namespace headwise::kernels::cuda

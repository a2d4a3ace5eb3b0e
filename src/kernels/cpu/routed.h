// A layer whose tokens choose heads, each for itself (mixture-of-heads attention, Jin et al. 2024,
// arXiv 2410.11842): queries, attention and the output projection of a head over the tokens that
// chose it, its keys and values over the sequence. Heads that no token of a sequence chose are
// never touched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/layer.h"

namespace headwise::kernels {

/// Everything a call reads. `layer.active` are the heads that some token of the sequence chose, and
/// `layer.head_weight` is [B, L, H].
template <typename T, typename Acc = T>
struct RoutedLayer {
  const Layer<T, Acc>& layer;
  const std::vector<int64_t>& tokens;  ///< those of each active head, ascending
  const std::vector<int64_t>& begin;   ///< [active + 1] where each head's begin in `tokens`

  int64_t count(int64_t n) const { return begin[n + 1] - begin[n]; }
  /// The sizes of active head n: its queries are those of the tokens that chose it.
  AttentionShape<Acc> shape(int64_t n) const {
    auto own = layer.shape;
    own.places = tokens.data() + begin[n];
    own.all_queries = own.queries;
    own.queries = count(n);
    return own;
  }
  /// The weight of an active head for a token.
  int64_t weight_place(const ActiveHead& a, int64_t token) const {
    return (a.b * layer.shape.queries + token) * layer.shape.num_heads + a.h;
  }
  /// Which entries of `tokens` are the tokens [row, row + rows) of active head n.
  struct Range {
    int64_t begin, end;
  };
  Range within(int64_t n, int64_t row, int64_t rows) const {
    const auto first = tokens.begin() + begin[n], last = tokens.begin() + begin[n + 1];
    return {std::lower_bound(first, last, row) - tokens.begin(),
            std::lower_bound(first, last, row + rows) - tokens.begin()};
  }
};

/// y [n, width] = the rows `tokens` [n] of sequence b.
template <typename T>
void gather_rows(const Rows<const T>& x, int64_t b, const int64_t* tokens, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) y = std::copy_n(x.at(b, tokens[i]), x.width, y);
}

/// As layer_forward. The workspace: q and context [tokens, d], lse [tokens]; k and v
/// [active, S + added, d].
template <typename T>
void routed_forward(const RoutedLayer<T>& routed, const LayerWorkspace<T>& workspace, T* output);

/// As layer_backward; the gradient of head_weight is [B, L, H].
template <typename T>
void routed_backward(const RoutedLayer<T>& routed, const LayerWorkspace<const T>& workspace,
                     const T* grad_output, const LayerGradients<T>& gradients);

/// routed_forward for float and bfloat16 over packed weights, if packed_layer_supported(); no
/// backward follows. context [tokens, d]: scratch.
template <typename T>
void routed_forward_packed(const RoutedLayer<T, float>& routed, T* context, T* output);

}  // namespace headwise::kernels

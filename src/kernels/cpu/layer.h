// The multihead layer over the heads that were chosen: projections, attention, output projection,
// forward and backward, over raw pointers. Heads that were not chosen are never touched.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/attention.h"

namespace headwise::kernels {

/// One chosen head of one sequence.
struct ActiveHead {
  int64_t b = 0;
  int64_t h = 0;
  int64_t slot = 0;  ///< its place in the workspaces
};

/// One row-major matrix per sequence: element (b, i, c) at data[b * batch + i * row + c].
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, row = 0, width = 0;
  T* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

/// Everything a call reads. The self form passes the same rows three times and three row ranges of
/// one weight. T: what is stored; Acc: what sums are kept in, and biases and masks given in.
template <typename T, typename Acc = T>
struct Layer {
  AttentionShape<Acc> shape;
  Rows<const T> query, key, value;          ///< [B, L, D], [B, S, Dk], [B, S, Dv]
  const T *q_weight, *k_weight, *v_weight;  ///< [E, D], [E, Dk], [E, Dv], contiguous
  const Acc *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr;  ///< [E] or null
  const Acc *bias_k = nullptr, *bias_v = nullptr;                     ///< [E] or null
  bool zero_row = false;             ///< the last added row is zeros
  const T* out_weight = nullptr;     ///< [Dout, E], contiguous
  const Acc* out_bias = nullptr;     ///< [Dout] or null
  int64_t out_width = 0;             ///< Dout
  const Acc* head_weight = nullptr;  ///< [B, H]
  /// Rounds projected rows to the narrower type in which backward reads them, if there is one. From
  /// unrounded rows forward would compute other scores than backward, and the exponential amplifies
  /// the difference.
  void (*round)(Acc* rows, int64_t n) = nullptr;
  std::vector<ActiveHead> active;  ///< by sequence
  std::vector<int64_t> first;      ///< [B + 1] where each sequence begins in `active`
};

/// q, context [slots, L, d]; k, v [slots, S + added, d]; lse [slots, L].
template <typename T, typename Acc = T>
struct LayerWorkspace {
  T *q, *k, *v, *context;
  Acc* lse;
};

/// output [B, L, Dout], contiguous: written in full.
template <typename T>
void layer_forward(const Layer<T>& layer, const LayerWorkspace<T>& workspace, T* output);

/// Whether layer_forward_packed serves this call: brgemm runs here and the widths suit it.
template <typename T>
bool packed_layer_supported(const Layer<T, float>& layer);

/// layer_forward for float and bfloat16 over packed weights; the fast path. Of the workspace only
/// the context is needed: q, k, v and lse may be null if no backward follows.
template <typename T>
void layer_forward_packed(const Layer<T, float>& layer, const LayerWorkspace<T, float>& workspace,
                          T* output);

/// Where to write gradients; null if not wanted. All contiguous; biases, head_weight and mask must
/// come zeroed. In the self form query, key and value are one pointer, and their gradients add up
/// there.
template <typename T, typename Acc = T>
struct LayerGradients {
  T *query = nullptr, *key = nullptr, *value = nullptr;
  T *q_weight = nullptr, *k_weight = nullptr, *v_weight = nullptr, *out_weight = nullptr;
  Acc *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr;
  Acc *out_bias = nullptr, *head_weight = nullptr;
  Acc *bias_k = nullptr, *bias_v = nullptr;
  MaskGradient<Acc> mask;
};

/// grad_output [B, L, Dout], contiguous; workspace as forward left it. The gradients of inputs and
/// weights must come zeroed too.
template <typename T>
void layer_backward(const Layer<T>& layer, const LayerWorkspace<const T>& workspace,
                    const T* grad_output, const LayerGradients<T>& gradients);

/// layer_backward for float and bfloat16 over packed operands; sums are float. The gradients of
/// inputs and weights are written in full.
template <typename T>
void layer_backward_packed(const Layer<T, float>& layer,
                           const LayerWorkspace<const T, const float>& workspace,
                           const T* grad_output, const LayerGradients<T, float>& gradients);

}  // namespace headwise::kernels

// Attention over the chosen (sequence, head) pairs: arguments, what a query may see, and which
// block does what (plain functions, tested on the host).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/layer.h"
#include "kernels/dropout.h"

namespace headwise::kernels::cuda {

/// Row i of unit u of sequence b of a tensor [B, U, R, w] by strides; elements of a row are next to
/// each other.
struct Units {
  const void* data = nullptr;
  int64_t batch_stride = 0, unit_stride = 0, row_stride = 0;
  HEADWISE_HOST_DEVICE int64_t offset(int64_t b, int64_t unit, int64_t row) const {
    return b * batch_stride + unit * unit_stride + row * row_stride;
  }
};

/// Units are rows of packed buffers (packed: the layer; their batch strides are 0) or heads, in
/// which case head h reads unit h / group of k and v.
struct PairAttentionArguments {
  Element type;
  Chosen chosen;
  bool packed;
  int64_t group;
  int64_t queries, keys;  ///< keys: all rows of k and v
  int64_t added;          ///< how many of the last keys no mask covers
  int64_t width, value_width;
  bool causal;
  double scale;
  Units q, k, v;
  const int32_t* limit;    ///< [B]: keys j >= limit[b] are hidden, but for the added; or null
  const int32_t* plain;    ///< [B], with `limit`: equal to it where the keys before it need no mask
  const bool* key_forbid;  ///< [B, keys - added], true: may not be seen; or null
  const void* key_add;     ///< [B, keys - added], accumulator type, added to the scores; or null
  const bool* mask_forbid;  ///< attn_mask by strides; or null
  const void* mask_add;     ///< attn_mask by strides, accumulator type; or null
  int64_t mask_stride[4];
  const int64_t* dropout_seed;  ///< [1], or null: no dropout
  double dropout_p;
  bool vectors;          ///< q, k, v and gradients of the context: 16 bytes at a time
  bool context_vectors;  ///< context and its gradients

  // Forward.
  Units context;       ///< written, before the weight
  Units weighted;      ///< written if not null: context times weight
  const void* weight;  ///< [B, H] accumulator type
  void* lse;           ///< [B * K, L] packed or [B, H, L], accumulator type: log of the denominator

  // Backward.
  Units grad_context;            ///< of weight * context
  const void* delta;             ///< like lse: rows of grad_context . context
  Units grad_q, grad_k, grad_v;  ///< written; for k and v, one unit per pair (no groups)
  void* grad_mask;               ///< [B, H, L, keys - added] accumulator type, or null
};

int attention_forward(const PairAttentionArguments& a, Stream stream);
/// delta and, if wanted, grad_weight [B, H]: sums over all rows and columns of grad_context .
/// context, grad_context being that of weight * context. With `weigh`, it is then multiplied by the
/// weight.
int attention_delta(const PairAttentionArguments& a, void* delta, void* grad_weight, bool weigh,
                    Stream stream);
int attention_backward(const PairAttentionArguments& a, Stream stream);

constexpr int64_t kWidestHead = 256;        ///< for any type
constexpr int64_t kWidestTensorHead = 128;  ///< through tensor cores

/// One (sequence, head) pair and its row of packed buffers.
struct Pair {
  int64_t b, place, h;
  HEADWISE_HOST_DEVICE int64_t unit(const PairAttentionArguments& a) const {
    return a.packed ? place : h;
  }
  HEADWISE_HOST_DEVICE int64_t kv_unit(const PairAttentionArguments& a) const {
    return a.packed ? place : h / a.group;
  }
  /// Row i of this pair in lse and delta.
  HEADWISE_HOST_DEVICE int64_t row(const PairAttentionArguments& a, int64_t i) const {
    return (a.packed ? place : b * a.chosen.num_heads + h) * a.queries + i;
  }
};

/// What block i works on: the chosen pairs one after another, `tiles` tiles each; h < 0 after the
/// last pair. Tiles are in descending order: under a causal mask the last rows have the most work.
struct PairTile {
  Pair pair;
  int64_t tile;
};
HEADWISE_HOST_DEVICE PairTile pair_tile(const Chosen& chosen, int64_t block, int64_t tiles) {
  const int64_t slot = chosen.pair_slot[block / tiles];
  if (slot < 0) return {{0, 0, -1}, 0};
  const int64_t b = slot / chosen.columns;
  return {{b, chosen.first[b] + slot % chosen.columns, chosen.head[slot]},
          tiles - 1 - block % tiles};
}

/// Which keys are hidden from a pair, read once.
struct KeyView {
  int64_t masked;  ///< keys that masks cover: keys - added
  int64_t limit;   ///< those at and after it, the added excepted, are hidden
  bool holes;      ///< key masks change some of the keys before it
};
HEADWISE_HOST_DEVICE KeyView key_view(const PairAttentionArguments& a, const Pair& pair) {
  const int64_t masked = a.keys - a.added;
  if (!a.limit) return {masked, masked, false};
  return {masked, a.limit[pair.b], a.plain[pair.b] != a.limit[pair.b]};
}
/// Keys [0, end) hold all that rows before `last_row` may see.
HEADWISE_HOST_DEVICE int64_t keys_end(const PairAttentionArguments& a, const KeyView& view,
                                      int64_t last_row) {
  if (a.added) return a.keys;
  return a.causal && last_row < view.limit ? last_row : view.limit;
}
/// Under a causal mask rows before this see none of the keys from `key` on.
HEADWISE_HOST_DEVICE int64_t first_row(const PairAttentionArguments& a, int64_t key) {
  return a.causal && !a.added ? key : 0;
}
/// True if no element of rows [row, ...) and keys [0, key_end) needs masked_score().
HEADWISE_HOST_DEVICE bool unmasked(const PairAttentionArguments& a, const KeyView& view,
                                   int64_t row, int64_t key_end) {
  const bool masks = view.holes || a.mask_forbid || a.mask_add;
  return !masks && key_end <= view.limit && (!a.causal || key_end <= row + 1);
}
/// True if the key is hidden from every query of the sequence: it need not be read.
HEADWISE_HOST_DEVICE bool key_hidden(const PairAttentionArguments& a, const KeyView& view,
                                     const Pair& pair, int64_t j) {
  if (j >= view.masked) return j >= a.keys;
  return j >= view.limit || (view.holes && a.key_forbid && a.key_forbid[pair.b * view.masked + j]);
}

/// The score of query i and key j with all masks; -inf: hidden.
template <typename C>
HEADWISE_HOST_DEVICE C masked_score(const PairAttentionArguments& a, const KeyView& view,
                                    const Pair& pair, int64_t i, int64_t j, C score) {
  const C hidden = -static_cast<C>(INFINITY);
  if (i >= a.queries || key_hidden(a, view, pair, j)) return hidden;
  if (j >= view.masked) return score;
  if (a.causal && j > i) return hidden;
  if (view.holes && a.key_add) score += static_cast<const C*>(a.key_add)[pair.b * view.masked + j];
  const int64_t at = pair.b * a.mask_stride[0] + pair.h * a.mask_stride[1] + i * a.mask_stride[2] +
                     j * a.mask_stride[3];
  if (a.mask_forbid && a.mask_forbid[at]) return hidden;
  if (a.mask_add) score += static_cast<const C*>(a.mask_add)[at];
  // -inf plus inf would be NaN, and a hidden key stays hidden.
  return score;
}

/// Dropout as a kernel reads it: the factor of probability (i, j).
template <typename C>
struct Dropout {
  uint64_t seed, threshold;
  C factor;
  int64_t queries, keys, first;  ///< first: the counter of row 0
  bool on;
  HEADWISE_HOST_DEVICE Dropout(const PairAttentionArguments& a, const Pair& pair)
      : seed(0),
        threshold(0),
        factor(1),
        queries(a.queries),
        keys(a.keys),
        first(0),
        on(a.dropout_seed != nullptr) {
    if (!on) return;
    seed = static_cast<uint64_t>(*a.dropout_seed);
    threshold = dropout_threshold(a.dropout_p);
    factor = a.dropout_p < 1 ? static_cast<C>(1 / (1 - a.dropout_p)) : C(0);
    first = static_cast<int64_t>(
        dropout_counter(pair.b, pair.h, 0, 0, a.chosen.num_heads, queries, keys));
  }
  HEADWISE_HOST_DEVICE C operator()(int64_t i, int64_t j) const {
    if (!on) return C(1);
    return counter_bits(seed, static_cast<uint64_t>(first + i * keys + j)) < threshold ? factor
                                                                                       : C(0);
  }
};

}  // namespace headwise::kernels::cuda

// Attention of one head of one sequence, by blocks of query rows, over raw pointers.
#pragma once

#include <cstdint>

namespace headwise::kernels {

constexpr int64_t kQueryBlock = 64;  ///< rows of queries that share a tile of scores
constexpr int64_t kKeyBlock = 512;   ///< columns of that tile

/// An additive or boolean mask as it lies in memory; null pointers: no mask.
template <typename T>
struct MaskView {
  const T* add = nullptr;                            ///< added to the scores
  const bool* forbid = nullptr;                      ///< true: may not attend
  int64_t batch = 0, head = 0, row = 0, column = 0;  ///< strides; 0 where broadcast
};

/// The accumulated gradient of an additive mask, in its shape: strides are 0 where it is broadcast.
/// Null: not wanted.
template <typename T>
struct MaskGradient {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
  int64_t copies = 1, copy_size = 0;  ///< a mask of all heads has copies, to be summed at the end
  T* of(int64_t copy, int64_t b, int64_t h) const {
    return data ? data + copy * copy_size + b * batch + h * head : nullptr;
  }
};

/// What all heads of a call share.
template <typename T>
struct AttentionShape {
  int64_t batch = 0, num_heads = 0;
  int64_t queries = 0;  ///< L
  /// Where each of the queries is among the `all_queries` of its sequence, ascending; null: they
  /// are all of them.
  const int64_t* places = nullptr;
  int64_t all_queries = 0;
  int64_t keys = 0;         ///< S, the given keys
  int64_t added = 0;        ///< rows after the given keys that every query sees
  int64_t width = 0;        ///< d of q and k
  int64_t value_width = 0;  ///< dv
  T scale = 1;
  bool causal = false;
  const int64_t* lengths = nullptr;  ///< [B] keys up to the last visible one; the rest is skipped
  const T* key_bias = nullptr;       ///< [B, S] added to the scores, or null
  MaskView<T> mask;
  double dropout_p = 0;
  uint64_t seed = 0;
  int64_t place(int64_t query) const { return places ? places[query] : query; }
};

/// One head of one sequence. k and v hold lengths[b] + added rows.
template <typename T>
struct HeadTensors {
  int64_t b = 0, h = 0;
  const T* q = nullptr;  ///< [L, d]
  const T* k = nullptr;  ///< [lengths[b] + added, d]
  const T* v = nullptr;  ///< [lengths[b] + added, dv]
  int64_t ldq = 0, ldk = 0, ldv = 0;
};

/// Elements of scratch that forward and backward need.
template <typename T>
int64_t attention_scratch(const AttentionShape<T>& shape);

/// context [rows, dv] (row distance ldc) and lse [rows] of queries [row, row + rows),
/// rows <= kQueryBlock. A row that sees no key gives zeros and lse = +inf.
template <typename T>
void attention_forward(const AttentionShape<T>& shape, const HeadTensors<T>& head, int64_t row,
                       int64_t rows, T* context, int64_t ldc, T* lse, T* scratch);

/// delta [L] of attention_backward() from the probabilities themselves. Computed from a `context`
/// stored in fewer bits it would have an error of that precision, which cancellation amplifies in
/// the gradient of large scores.
template <typename T>
void attention_row_sums(const AttentionShape<T>& shape, const HeadTensors<T>& head,
                        const T* grad_context, int64_t ldg, const T* lse, T* delta, T* scratch);

/// Overwrites (does not accumulate) dq [L, d], dk and dv [lengths[b] + added, .] of one head, from
/// the gradient of its context. delta [L]: rows' sum of grad_context * context. `mask_head` (may be
/// null): this head's part of the gradient of the additive mask; it is accumulated.
template <typename T>
void attention_backward(const AttentionShape<T>& shape, const HeadTensors<T>& head,
                        const T* grad_context, int64_t ldg, const T* delta, const T* lse, T* dq,
                        int64_t lddq, T* dk, int64_t lddk, T* dv, int64_t lddv,
                        const MaskGradient<T>& mask, T* mask_head, T* scratch);

}  // namespace headwise::kernels

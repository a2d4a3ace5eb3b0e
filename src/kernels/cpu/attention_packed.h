// Attention of one head over packed operands: float sums, T = float or bfloat16 storage.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/attention.h"

namespace headwise::kernels {

/// Elements of T that a head's packed keys and values take.
template <typename T>
int64_t packed_keys_size(const AttentionShape<float>& shape);

/// Bytes of scratch for packed_attention_forward.
template <typename T>
int64_t packed_attention_scratch(const AttentionShape<float>& shape);

/// Packs k [columns, d] as k' and v [columns, dv], columns = lengths[b] + added.
template <typename T>
void pack_keys(const AttentionShape<float>& shape, int64_t columns, const T* k, int64_t ldk,
               const T* v, int64_t ldv, T* packed);

/// As attention_forward; `packed` from pack_keys, lse may be null.
template <typename T>
void packed_attention_forward(const AttentionShape<float>& shape, int64_t b, int64_t h, const T* q,
                              int64_t ldq, const T* packed, int64_t row, int64_t rows, T* context,
                              int64_t ldc, float* lse, void* scratch);

/// Where to write a head's gradients, each as it is (rows are tokens) and transposed (rows are
/// features, of an even length, padded with zeros): the products with weights need the former,
/// those with inputs the latter. The transposed ones may be null: not needed.
template <typename T>
struct HeadGradients {
  T *q, *k, *v;                       ///< [L, d], [columns, d], [columns, dv]
  T *q_turned, *k_turned, *v_turned;  ///< [d, even(L)], [d, even(columns)], [dv, even(columns)]
};

/// Bytes of scratch for packed_attention_backward.
template <typename T>
int64_t packed_backward_scratch(const AttentionShape<float>& shape);

/// As attention_backward; columns = lengths[b] + added. For bfloat16, d and dv are even.
template <typename T>
void packed_attention_backward(const AttentionShape<float>& shape, const HeadTensors<T>& head,
                               const T* grad_context, int64_t ldg, const float* delta,
                               const float* lse, const MaskGradient<float>& mask, float* mask_head,
                               const HeadGradients<T>& gradients, std::byte* scratch);

}  // namespace headwise::kernels

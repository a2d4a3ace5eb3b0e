// Attention of one head over packed operands: float sums, T = float or bfloat16 storage.
#pragma once

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

/// As attention_forward; `packed` from pack_keys.
template <typename T>
void packed_attention_forward(const AttentionShape<float>& shape, int64_t b, int64_t h, const T* q,
                              int64_t ldq, const T* packed, int64_t row, int64_t rows, T* context,
                              int64_t ldc, float* lse, void* scratch);

}  // namespace headwise::kernels

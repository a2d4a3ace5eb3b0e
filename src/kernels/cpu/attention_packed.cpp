#include "kernels/cpu/attention_packed.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/scores.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/softmax.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

/// Distance between the rows of a tile of scores: no further apart than they are long, and no power
/// of two, so that they do not fall into the same sets of a cache.
constexpr int64_t tile_row(int64_t columns) {
  return (std::min(columns, kKeyBlock) + kLanes - 1) / kLanes * kLanes + kLanes;
}

/// The tile that enters the second product: floats as they are, bfloat16 rounded.
const float* as_operand(const float* s, int64_t, int64_t, int64_t, float*) { return s; }
const BFloat16* as_operand(const float* s, int64_t rows, int64_t width, int64_t ld, BFloat16* y) {
  convert_rows(rows, width, s, ld, nullptr, y, ld);
  if (width % 2)
    for (int64_t i = 0; i < rows; ++i) y[i * ld + width] = BFloat16(0.f);
  return y;
}

}  // namespace

template <typename T>
int64_t packed_keys_size(const AttentionShape<float>& shape) {
  return even(shape.keys + shape.added) * (shape.width + shape.value_width);
}

template <typename T>
int64_t packed_attention_scratch(const AttentionShape<float>& shape) {
  const int64_t ld = tile_row(shape.keys + shape.added);
  const int64_t floats = kQueryBlock * (ld + shape.value_width + 3);
  return floats * sizeof(float) + (sizeof(T) == 2 ? kQueryBlock * ld * sizeof(T) : 0);
}

template <typename T>
void pack_keys(const AttentionShape<float>& shape, int64_t columns, const T* k, int64_t ldk,
               const T* v, int64_t ldv, T* packed) {
  // Keys are packed by the key block, so that each block is one operand with its own row length.
  T* keys = packed;
  T* values = packed + even(columns) * shape.width;
  for (int64_t column = 0; column < columns; column += kKeyBlock) {
    const int64_t width = std::min(kKeyBlock, columns - column);
    pack(shape.width, width, k + column * ldk, ldk, true, keys + column * shape.width);
  }
  pack(columns, shape.value_width, v, ldv, false, values);
}

template <typename T>
void packed_attention_forward(const AttentionShape<float>& shape, int64_t b, int64_t h, const T* q,
                              int64_t ldq, const T* packed, int64_t row, int64_t rows, T* context,
                              int64_t ldc, float* lse, void* scratch) {
  const int64_t columns = shape.lengths[b] + shape.added, dv = shape.value_width;
  const int64_t visible = visible_columns(shape, row, rows, columns);
  const T* keys = packed;
  const T* values = packed + even(columns) * shape.width;
  const int64_t ld = tile_row(columns);
  float* s = static_cast<float*>(scratch);            // [rows, ld]
  float* y = s + kQueryBlock * ld;                    // [rows, dv]
  float* maximum = y + kQueryBlock * dv;              // [rows]
  float* sum = maximum + kQueryBlock;                 // [rows]
  float* factor = sum + kQueryBlock;                  // [rows]
  T* p = reinterpret_cast<T*>(factor + kQueryBlock);  // [rows, ld], bfloat16 only
  const bool plain =
      shape.scale > 0 && !shape.key_bias && !shape.mask.add && !shape.mask.forbid && !shape.causal;
  const float score_scale = plain ? shape.scale : 1.f;  // else mask_scores scales
  std::fill_n(maximum, rows, -kInfinity);
  std::fill_n(sum, rows, 0.f);
  if (visible == 0) std::fill_n(y, rows * dv, 0.f);
  for (int64_t column = 0; column < visible; column += kKeyBlock) {
    const int64_t block = std::min(kKeyBlock, columns - column);  // row length of the packed keys
    const int64_t width = std::min(kKeyBlock, visible - column);
    packed_gemm(rows, width, shape.width, q + row * ldq, ldq, keys + column * shape.width, block, s,
                ld, false);
    if (!plain) mask_scores(shape, b, h, row, rows, column, width, s, ld);
    softmax_block(s, ld, rows, width, score_scale, maximum, sum, factor);
    if (column > 0)
      for (int64_t i = 0; i < rows; ++i) scale(y + i * dv, dv, factor[i], y + i * dv);
    if (shape.dropout_p > 0) drop(shape, b, h, row, rows, column, width, s, ld);
    packed_gemm(rows, dv, sizeof(T) == 2 ? even(width) : width, as_operand(s, rows, width, ld, p),
                ld, packed_at(values, dv, column, 0), dv, y, dv, column > 0);
  }
  for (int64_t i = 0; i < rows; ++i) factor[i] = sum[i] == 0.f ? 0.f : 1 / sum[i];
  convert_scaled(rows, dv, y, dv, factor, context, ldc);
  if (!lse) return;
  for (int64_t i = 0; i < rows; ++i)
    lse[i] = sum[i] == 0.f ? kInfinity : std::log(sum[i]) + (sum[i] == sum[i] ? maximum[i] : 0.f);
}

#define HEADWISE_INSTANTIATE(T)                                                                  \
  template int64_t packed_keys_size<T>(const AttentionShape<float>&);                            \
  template int64_t packed_attention_scratch<T>(const AttentionShape<float>&);                    \
  template void pack_keys<T>(const AttentionShape<float>&, int64_t, const T*, int64_t, const T*, \
                             int64_t, T*);                                                       \
  template void packed_attention_forward<T>(const AttentionShape<float>&, int64_t, int64_t,      \
                                            const T*, int64_t, const T*, int64_t, int64_t, T*,   \
                                            int64_t, float*, void*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

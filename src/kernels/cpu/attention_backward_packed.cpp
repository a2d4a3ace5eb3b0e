// The gradient of attention of one head over packed operands. Tiles hold keys by queries: the
// gradients of keys and values then take them as they are, and that of queries takes them as its
// right factor, so no tile is ever transposed.
#include <algorithm>

#include "kernels/cpu/attention_packed.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/scores.h"
#include "kernels/cpu/softmax.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

constexpr int64_t kTileKeys = 128;  // a tile of floats, and its gradient, fill half of an L2 cache

/// Terms that a product of T takes for k of them.
template <typename T>
int64_t terms(int64_t k) {
  return sizeof(T) == 2 ? even(k) : k;
}

/// Scratch of one head, cut out of one piece of memory.
template <typename T>
struct Workspace {
  float *s, *dp, *dq, *tile, *dk, *dv;
  T *p_rows, *ds_rows, *ds_packed;           // [kTileKeys, kQueryBlock]
  T *q_turned, *q_rows, *g_turned, *g_rows;  // one block of queries, packed
  T* keys_turned;                            // [d, even(columns)]
  int64_t bytes;

  Workspace(const AttentionShape<float>& shape, std::byte* memory) {
    bytes = 0;
    auto cut = [&]<typename U>(U*& pointer, int64_t n) {
      pointer = memory ? reinterpret_cast<U*>(memory + bytes) : nullptr;
      bytes += (n * int64_t(sizeof(U)) + 63) / 64 * 64;
    };
    const int64_t d = shape.width, dv_width = shape.value_width;
    const int64_t columns = shape.keys + shape.added, tile_size = kTileKeys * kQueryBlock;
    cut(s, tile_size), cut(dp, tile_size), cut(dq, d * kQueryBlock);
    cut(tile, 2 * kTransposeRows * std::max(d, dv_width));
    cut(dk, columns * d), cut(dv, columns * dv_width);
    const int64_t operand = sizeof(T) == 2 ? tile_size : 0;  // floats enter products as they are
    cut(p_rows, operand), cut(ds_rows, operand), cut(ds_packed, operand);
    cut(q_turned, d * kQueryBlock), cut(q_rows, d * kQueryBlock);
    cut(g_turned, dv_width * kQueryBlock), cut(g_rows, dv_width * kQueryBlock);
    cut(keys_turned, d * even(columns));
  }
};

/// A tile as the left factor of a product over queries.
const float* as_rows(const float* x, int64_t, int64_t, float*) { return x; }
const BFloat16* as_rows(const float* x, int64_t keys, int64_t queries, BFloat16* y) {
  for (int64_t j = 0; j < keys; ++j) {
    convert(x + j * kQueryBlock, queries, y + j * kQueryBlock);
    if (queries % 2) y[j * kQueryBlock + queries] = BFloat16(0.f);
  }
  return y;
}

/// The same tile as the right factor of a product over keys.
struct RightFactor {
  const void* data;
  int64_t row_length;
};
RightFactor as_factor(const float* rows, int64_t, int64_t, float*) { return {rows, kQueryBlock}; }
RightFactor as_factor(const BFloat16* rows, int64_t keys, int64_t queries, BFloat16* y) {
  pack(keys, queries, rows, kQueryBlock, false, y);
  return {y, queries};
}

/// Floats x [rows, width] into both forms of a gradient. `turned` has rows of length ld.
template <typename T>
void store_gradient(const float* x, int64_t rows, int64_t width, T* as_it_stands, T* turned,
                    int64_t ld, float* tile) {
  convert(x, rows * width, as_it_stands);
  if (!turned) return;
  for (int64_t row = 0; row < rows; row += kTransposeRows) {
    const int64_t n = std::min(kTransposeRows, rows - row);
    transpose(n, width, x + row * width, width, tile, kTransposeRows);
    for (int64_t c = 0; c < width; ++c)
      convert(tile + c * kTransposeRows, n, turned + c * ld + row);
  }
  if (rows < ld)
    for (int64_t c = 0; c < width; ++c) std::fill_n(turned + c * ld + rows, ld - rows, T(0.f));
}

}  // namespace

template <typename T>
int64_t packed_backward_scratch(const AttentionShape<float>& shape) {
  return Workspace<T>(shape, nullptr).bytes;
}

template <typename T>
void packed_attention_backward(const AttentionShape<float>& shape, const HeadTensors<T>& head,
                               const T* grad_context, int64_t ldg, const float* delta,
                               const float* lse, const MaskGradient<float>& mask, float* mask_head,
                               const HeadGradients<T>& gradients, std::byte* scratch) {
  const Workspace<T> w(shape, scratch);
  const int64_t length = shape.lengths[head.b], columns = length + shape.added;
  const int64_t d = shape.width, dv = shape.value_width, ldk = even(columns),
                ldq = even(shape.queries);
  const bool plain = !shape.key_bias && !shape.mask.add && !shape.mask.forbid && !shape.causal;
  const float score_scale = plain ? shape.scale : 1.f;  // else mask_scores scales
  transpose_scaled(columns, d, head.k, head.ldk, 1.f, w.keys_turned, ldk, w.tile);
  if (columns < ldk)
    for (int64_t c = 0; c < d; ++c) w.keys_turned[c * ldk + columns] = T(0.f);
  std::fill_n(w.dk, columns * d, 0.f);
  std::fill_n(w.dv, columns * dv, 0.f);

  for (int64_t row = 0; row < shape.queries; row += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, shape.queries - row);
    // An even number of keys, so that no key after them meets a padded term.
    const int64_t visible = std::min(columns, terms<T>(visible_columns(shape, row, rows, columns)));
    const T* q = head.q + row * head.ldq;
    const T* g = grad_context + row * ldg;
    pack(d, rows, q, head.ldq, true, w.q_turned);
    pack(rows, d, q, head.ldq, false, w.q_rows);
    pack(dv, rows, g, ldg, true, w.g_turned);
    pack(rows, dv, g, ldg, false, w.g_rows);
    if (visible == 0) std::fill_n(w.dq, d * kQueryBlock, 0.f);
    for (int64_t column = 0; column < visible; column += kTileKeys) {
      const int64_t keys = std::min(kTileKeys, visible - column);
      packed_gemm(keys, rows, d, head.k + column * head.ldk, head.ldk, w.q_turned, rows, w.s,
                  kQueryBlock, false);
      if (!plain)
        mask_scores<true>(shape, head.b, head.h, row, rows, column, keys, w.s, kQueryBlock);
      packed_gemm(keys, rows, dv, head.v + column * head.ldv, head.ldv, w.g_turned, rows, w.dp,
                  kQueryBlock, false);
      if (shape.dropout_p > 0)
        drop<true>(shape, head.b, head.h, row, rows, column, keys, w.dp, kQueryBlock);
      for (int64_t j = 0; j < keys; ++j) {
        float *p = w.s + j * kQueryBlock, *dp = w.dp + j * kQueryBlock;
        shifted_exponential(p, rows, score_scale, lse + row);
        shifted_gradient(p, rows, delta + row, mask_head ? 1.f : shape.scale, dp);
        if (mask_head) {
          if (column + j < length)
            for (int64_t i = 0; i < rows; ++i)
              mask_head[shape.place(row + i) * mask.row + (column + j) * mask.column] += dp[i];
          scale(dp, rows, shape.scale, dp);
        }
      }
      if (shape.dropout_p > 0)
        drop<true>(shape, head.b, head.h, row, rows, column, keys, w.s, kQueryBlock);
      const auto* p = as_rows(w.s, keys, rows, w.p_rows);
      const auto* ds = as_rows(w.dp, keys, rows, w.ds_rows);
      packed_gemm(keys, dv, terms<T>(rows), p, kQueryBlock, w.g_rows, dv, w.dv + column * dv, dv,
                  true);
      packed_gemm(keys, d, terms<T>(rows), ds, kQueryBlock, w.q_rows, d, w.dk + column * d, d,
                  true);
      const auto factor = as_factor(ds, keys, rows, w.ds_packed);
      packed_gemm(d, rows, terms<T>(keys), w.keys_turned + column, ldk,
                  static_cast<const T*>(factor.data), factor.row_length, w.dq, kQueryBlock,
                  column > 0);
    }
    if (gradients.q_turned)
      for (int64_t c = 0; c < d; ++c)
        convert(w.dq + c * kQueryBlock, rows, gradients.q_turned + c * ldq + row);
    transpose(d, rows, w.dq, kQueryBlock, w.tile, d);
    convert(w.tile, rows * d, gradients.q + row * d);
  }
  if (gradients.q_turned && shape.queries < ldq)
    for (int64_t c = 0; c < d; ++c) gradients.q_turned[c * ldq + shape.queries] = T(0.f);
  store_gradient(w.dk, columns, d, gradients.k, gradients.k_turned, ldk, w.tile);
  store_gradient(w.dv, columns, dv, gradients.v, gradients.v_turned, ldk, w.tile);
}

#define HEADWISE_INSTANTIATE(T)                                                             \
  template int64_t packed_backward_scratch<T>(const AttentionShape<float>&);                \
  template void packed_attention_backward<T>(                                               \
      const AttentionShape<float>&, const HeadTensors<T>&, const T*, int64_t, const float*, \
      const float*, const MaskGradient<float>&, float*, const HeadGradients<T>&, std::byte*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

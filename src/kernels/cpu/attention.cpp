#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/scores.h"
#include "kernels/cpu/softmax.h"

namespace headwise::kernels {
template <typename T>
int64_t attention_scratch(const AttentionShape<T>& shape) {
  return kQueryBlock * (2 * kKeyBlock + 2);
}

template <typename T>
void attention_forward(const AttentionShape<T>& shape, const HeadTensors<T>& head, int64_t row,
                       int64_t rows, T* context, int64_t ldc, T* lse, T* scratch) {
  const int64_t columns = shape.lengths[head.b] + shape.added;
  const int64_t visible = visible_columns(shape, row, rows, columns);
  T* s = scratch;
  T* maximum = scratch + kQueryBlock * kKeyBlock;
  T* sum = maximum + kQueryBlock;
  std::fill(maximum, maximum + rows, -std::numeric_limits<T>::infinity());
  std::fill(sum, sum + rows, T(0));
  for (int64_t i = 0; i < rows; ++i) std::fill_n(context + i * ldc, shape.value_width, T(0));
  for (int64_t column = 0; column < visible; column += kKeyBlock) {
    const int64_t width = std::min(kKeyBlock, visible - column);
    gemm<T>(Transpose::no, Transpose::yes, rows, width, shape.width, 1, head.q + row * head.ldq,
            head.ldq, head.k + column * head.ldk, head.ldk, 0, s, kKeyBlock);
    mask_scores(shape, head.b, head.h, row, rows, column, width, s, kKeyBlock);
    for (int64_t i = 0; i < rows; ++i) {
      T* si = s + i * kKeyBlock;
      const T top = std::max(maximum[i], row_maximum(si, width));
      // A row that has seen nothing yet is shifted by 0, so that exp(-inf) = 0 and not NaN.
      const T shift = top == -std::numeric_limits<T>::infinity() ? T(0) : top;
      const T rescale =
          maximum[i] == -std::numeric_limits<T>::infinity() ? T(0) : std::exp(maximum[i] - shift);
      sum[i] = sum[i] * rescale + row_exponential(si, width, T(1), shift);
      maximum[i] = top;
      if (column > 0)
        for (int64_t c = 0; c < shape.value_width; ++c) context[i * ldc + c] *= rescale;
    }
    if (shape.dropout_p > 0) drop(shape, head.b, head.h, row, rows, column, width, s, kKeyBlock);
    gemm<T>(Transpose::no, Transpose::no, rows, shape.value_width, width, 1, s, kKeyBlock,
            head.v + column * head.ldv, head.ldv, 1, context, ldc);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool empty = sum[i] == T(0);
    const T inverse = empty ? T(0) : 1 / sum[i];
    for (int64_t c = 0; c < shape.value_width; ++c) {
      T& y = context[i * ldc + c];
      y = empty ? T(0) : y * inverse;  // 0 * value would carry a non-finite value of a masked key
    }
    lse[i] = empty ? std::numeric_limits<T>::infinity()
                   : std::log(sum[i]) + (sum[i] == sum[i] ? maximum[i] : T(0));
  }
}

namespace {

/// p [rows, width], the probabilities of a block before dropout, and dp, their gradients.
template <typename T>
void probabilities(const AttentionShape<T>& shape, const HeadTensors<T>& head, const T* g,
                   int64_t ldg, const T* lse, int64_t row, int64_t rows, int64_t column,
                   int64_t width, T* p, T* dp) {
  gemm<T>(Transpose::no, Transpose::yes, rows, width, shape.width, 1, head.q + row * head.ldq,
          head.ldq, head.k + column * head.ldk, head.ldk, 0, p, kKeyBlock);
  mask_scores(shape, head.b, head.h, row, rows, column, width, p, kKeyBlock);
  gemm<T>(Transpose::no, Transpose::yes, rows, width, shape.value_width, 1, g, ldg,
          head.v + column * head.ldv, head.ldv, 0, dp, kKeyBlock);
  if (shape.dropout_p > 0) drop(shape, head.b, head.h, row, rows, column, width, dp, kKeyBlock);
  for (int64_t i = 0; i < rows; ++i) row_exponential(p + i * kKeyBlock, width, T(1), lse[row + i]);
}

}  // namespace

template <typename T>
void attention_row_sums(const AttentionShape<T>& shape, const HeadTensors<T>& head,
                        const T* grad_context, int64_t ldg, const T* lse, T* delta, T* scratch) {
  const int64_t columns = shape.lengths[head.b] + shape.added;
  T *const p = scratch, *const dp = scratch + kQueryBlock * kKeyBlock;
  std::fill_n(delta, shape.queries, T(0));
  for (int64_t row = 0; row < shape.queries; row += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, shape.queries - row);
    const int64_t visible = visible_columns(shape, row, rows, columns);
    for (int64_t column = 0; column < visible; column += kKeyBlock) {
      const int64_t width = std::min(kKeyBlock, visible - column);
      probabilities(shape, head, grad_context + row * ldg, ldg, lse, row, rows, column, width, p,
                    dp);
      for (int64_t i = 0; i < rows; ++i) {
        T sum = 0;  // a masked key may hold NaN
        for (int64_t j = i * kKeyBlock; j < i * kKeyBlock + width; ++j)
          if (p[j] != T(0)) sum += p[j] * dp[j];
        delta[row + i] += sum;
      }
    }
  }
}

template <typename T>
void attention_backward(const AttentionShape<T>& shape, const HeadTensors<T>& head,
                        const T* grad_context, int64_t ldg, const T* delta, const T* lse, T* dq,
                        int64_t lddq, T* dk, int64_t lddk, T* dv, int64_t lddv,
                        const MaskGradient<T>& mask, T* mask_head, T* scratch) {
  const int64_t length = shape.lengths[head.b];
  const int64_t columns = length + shape.added;
  for (int64_t i = 0; i < shape.queries; ++i) std::fill_n(dq + i * lddq, shape.width, T(0));
  for (int64_t j = 0; j < columns; ++j) {
    std::fill_n(dk + j * lddk, shape.width, T(0));
    std::fill_n(dv + j * lddv, shape.value_width, T(0));
  }
  T* p = scratch;                             // [rows, width] probabilities
  T* dp = scratch + kQueryBlock * kKeyBlock;  // [rows, width] their gradients, then the scores'
  for (int64_t row = 0; row < shape.queries; row += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, shape.queries - row);
    const int64_t visible = visible_columns(shape, row, rows, columns);
    const T* q = head.q + row * head.ldq;
    const T* g = grad_context + row * ldg;
    for (int64_t column = 0; column < visible; column += kKeyBlock) {
      const int64_t width = std::min(kKeyBlock, visible - column);
      const T* k = head.k + column * head.ldk;
      probabilities(shape, head, g, ldg, lse, row, rows, column, width, p, dp);
      for (int64_t i = 0; i < rows; ++i) {
        T* di = dp + i * kKeyBlock;
        row_gradient(p + i * kKeyBlock, width, delta[row + i], di);
        if (mask_head) {
          const int64_t given = std::clamp<int64_t>(length - column, 0, width);
          T* to = mask_head + shape.place(row + i) * mask.row + column * mask.column;
          for (int64_t j = 0; j < given; ++j) to[j * mask.column] += di[j];
        }
      }
      if (shape.dropout_p > 0) drop(shape, head.b, head.h, row, rows, column, width, p, kKeyBlock);
      gemm<T>(Transpose::no, Transpose::no, rows, shape.width, width, shape.scale, dp, kKeyBlock, k,
              head.ldk, 1, dq + row * lddq, lddq);
      gemm<T>(Transpose::yes, Transpose::no, width, shape.width, rows, shape.scale, dp, kKeyBlock,
              q, head.ldq, 1, dk + column * lddk, lddk);
      gemm<T>(Transpose::yes, Transpose::no, width, shape.value_width, rows, 1, p, kKeyBlock, g,
              ldg, 1, dv + column * lddv, lddv);
    }
  }
}

#define HEADWISE_INSTANTIATE(T)                                                                  \
  template int64_t attention_scratch<T>(const AttentionShape<T>&);                               \
  template void attention_forward<T>(const AttentionShape<T>&, const HeadTensors<T>&, int64_t,   \
                                     int64_t, T*, int64_t, T*, T*);                              \
  template void attention_backward<T>(const AttentionShape<T>&, const HeadTensors<T>&, const T*, \
                                      int64_t, const T*, const T*, T*, int64_t, T*, int64_t, T*, \
                                      int64_t, const MaskGradient<T>&, T*, T*);                  \
  template void attention_row_sums<T>(const AttentionShape<T>&, const HeadTensors<T>&, const T*, \
                                      int64_t, const T*, T*, T*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(double)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

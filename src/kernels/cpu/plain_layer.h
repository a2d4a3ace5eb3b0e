// Pieces of the layer over plain products, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/layer.h"

namespace headwise::kernels {

/// y [rows, width] = `row` in each; zeros if it is null.
template <typename T>
void fill_rows(const T* row, int64_t rows, int64_t width, T* y) {
  for (int64_t i = 0; i < rows; ++i) {
    if (row)
      std::copy_n(row, width, y + i * width);
    else
      std::fill_n(y + i * width, width, T(0));
  }
}

/// y [rows, d] = x [rows, D] W_h' + b_h for the rows of one head.
template <typename T>
void project(const Layer<T>& layer, const Rows<const T>& x, int64_t b, int64_t rows,
             const T* weight, const T* bias, int64_t h, T* y) {
  const int64_t d = layer.shape.width;
  fill_rows(bias ? bias + h * d : nullptr, rows, d, y);
  gemm<T>(Transpose::no, Transpose::yes, rows, d, x.width, 1, x.at(b, 0), x.row,
          weight + h * d * x.width, x.width, 1, y, d);
  if (layer.round) layer.round(y, rows * d);
}

/// The rows after the given keys: bias_k / bias_v, then zeros.
template <typename T>
void append_rows(const Layer<T>& layer, const ActiveHead& a, const T* bias, T* rows) {
  const int64_t d = layer.shape.width;
  T* y = rows + layer.shape.lengths[a.b] * d;
  if (bias) y = std::copy_n(bias + a.h * d, d, y);
  if (layer.zero_row) std::fill_n(y, d, T(0));
}

template <typename T>
void add_column_sums(const T* x, int64_t rows, int64_t d, T* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < d; ++c) sums[c] += x[i * d + c];
}

/// Adds the gradients of one head's weight and bias: of its rows [rows, d], projected from x, whose
/// own row stride is `stride`. Null if not wanted.
template <typename T>
void add_weight_gradient(const T* of, int64_t rows, int64_t d, int64_t h, const T* x,
                         int64_t stride, int64_t width, T* weight, T* bias) {
  if (weight)
    gemm<T>(Transpose::yes, Transpose::no, d, width, rows, 1, of, d, x, stride, 1,
            weight + h * d * width, width);
  if (bias) add_column_sums(of, rows, d, bias + h * d);
}

/// The same for the keys or values of an active head, with the rows that bias_k or bias_v added.
template <typename T>
void add_key_gradient(const Layer<T>& layer, const ActiveHead& a, const T* of,
                      const Rows<const T>& x, T* weight, T* bias, T* row_bias) {
  const int64_t d = layer.shape.width, length = layer.shape.lengths[a.b];
  add_weight_gradient(of, length, d, a.h, x.at(a.b, 0), x.row, x.width, weight, bias);
  if (row_bias) add_column_sums(of + length * d, 1, d, row_bias + a.h * d);
}

}  // namespace headwise::kernels

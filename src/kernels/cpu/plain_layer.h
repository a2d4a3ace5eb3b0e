// Pieces of the layer over plain products, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/layer.h"

namespace headwise::kernels {

/// y [rows, d] = x [rows, D] W_h' + b_h for the rows of one head.
template <typename T>
void project(const Layer<T>& layer, const Rows<const T>& x, int64_t b, int64_t rows,
             const T* weight, const T* bias, int64_t h, T* y) {
  const int64_t d = layer.shape.width;
  for (int64_t i = 0; i < rows; ++i) {
    if (bias)
      std::copy_n(bias + h * d, d, y + i * d);
    else
      std::fill_n(y + i * d, d, T(0));
  }
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

}  // namespace headwise::kernels

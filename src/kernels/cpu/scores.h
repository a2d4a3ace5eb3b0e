// What happens to a tile of scores between the two products of attention: scale, masks, dropout.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/cpu/attention.h"
#include "kernels/dropout.h"

namespace headwise::kernels {

/// A tile of scores, queries by keys, as it lies in memory.
template <typename T, bool keys_first>
struct ScoreTile {
  T* data;
  int64_t row_length;
  T& operator()(int64_t query, int64_t key) const {
    return keys_first ? data[key * row_length + query] : data[query * row_length + key];
  }
};

/// Turns raw products into scores: scale and masks. The tile s, [rows, columns] or with
/// `keys_first` [columns, rows], holds queries row.. against keys column.. of the list 'given keys
/// up to the length, then the added rows'.
template <bool keys_first = false, typename T>
void mask_scores(const AttentionShape<T>& shape, int64_t b, int64_t h, int64_t row, int64_t rows,
                 int64_t column, int64_t columns, T* s, int64_t lds) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const ScoreTile<T, keys_first> tile{s, lds};
  const int64_t given = std::clamp<int64_t>(shape.lengths[b] - column, 0, columns);
  const T* bias = shape.key_bias ? shape.key_bias + b * shape.keys + column : nullptr;
  const auto& mask = shape.mask;
  const int64_t base = b * mask.batch + h * mask.head + column * mask.column;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) tile(i, j) *= shape.scale;
    if (bias)
      for (int64_t j = 0; j < given; ++j) tile(i, j) += bias[j];
    if (mask.add) {
      const T* mi = mask.add + base + shape.place(row + i) * mask.row;
      for (int64_t j = 0; j < given; ++j) tile(i, j) += mi[j * mask.column];
    }
    if (mask.forbid) {
      const bool* mi = mask.forbid + base + shape.place(row + i) * mask.row;
      for (int64_t j = 0; j < given; ++j) tile(i, j) = mi[j * mask.column] ? -infinity : tile(i, j);
    }
    if (shape.causal)
      for (int64_t j = std::max<int64_t>(shape.place(row + i) + 1 - column, 0); j < given; ++j)
        tile(i, j) = -infinity;
  }
}

/// Applies the dropout mask to a tile of probabilities in place; the tile as in mask_scores.
template <bool keys_first = false, typename T>
void drop(const AttentionShape<T>& shape, int64_t b, int64_t h, int64_t row, int64_t rows,
          int64_t column, int64_t columns, T* p, int64_t ldp) {
  const ScoreTile<T, keys_first> tile{p, ldp};
  const uint64_t threshold = dropout_threshold(shape.dropout_p);
  const T keep = shape.dropout_p < 1 ? T(1 / (1 - shape.dropout_p)) : T(0);
  const int64_t length = shape.lengths[b];
  const int64_t queries = shape.places ? shape.all_queries : shape.queries;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t key = column + j < length ? column + j : column + j - length + shape.keys;
      const uint64_t counter = dropout_counter(b, h, shape.place(row + i), key, shape.num_heads,
                                               queries, shape.keys + shape.added);
      tile(i, j) *= counter_bits(shape.seed, counter) < threshold ? keep : T(0);
    }
}

/// The first key column that no query of the block [row, row + rows) sees, or `columns`.
template <typename T>
int64_t visible_columns(const AttentionShape<T>& shape, int64_t row, int64_t rows,
                        int64_t columns) {
  // Added rows come after the given keys, so with any of them nothing can be left out at the end.
  if (!shape.causal || shape.added) return columns;
  return std::min(columns, shape.place(row + rows - 1) + 1);
}

}  // namespace headwise::kernels

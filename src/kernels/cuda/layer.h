// The matrix products of the layer, on what a selection chose: arguments, and which block does what
// (plain functions, tested on the host).
#pragma once

#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/host_device.h"

namespace headwise::kernels::cuda {

/// A selection as the kernels read it, cleaned by work_list(). Slot b * columns + n is place n of
/// row b of index. Packed buffers [B * K, R, d] hold its rows at first[b] + n: without gaps between
/// sequences; rows after the last are never touched.
struct Chosen {
  int64_t batch, columns, num_heads;
  const int32_t* head;       ///< [B, K], -1 where the slot is not chosen
  const int32_t* count;      ///< [B] in [0, K]: chosen slots all lie before it
  const int32_t* pair_slot;  ///< [B * K] chosen slots, those of head 0 first; then -1
  const int32_t* offset;     ///< [H + 1] where the slots of each head begin in pair_slot
  const int32_t* first;      ///< [B + 1]
};

/// A row [b, l] of a tensor [B, R, columns] by strides, columns next to each other.
struct Rows {
  const void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
  HEADWISE_HOST_DEVICE int64_t offset(int64_t b, int64_t l) const {
    return b * batch_stride + l * row_stride;
  }
};

constexpr int kMaxParts = 3;  // query, key, value

/// packed[first[b] + n, l, :] = input[b, l, :] weight[h d .. h d + d, :]' + bias[h d .. h d + d],
/// for the chosen slots; rows l >= limit[b] are left as they are.
struct ProjectPart {
  Rows input;             ///< [B, R, depth]
  int64_t rows, depth;    ///< R
  const void* weight;     ///< [E, depth]
  int64_t weight_stride;  ///< of its rows
  const void* bias;       ///< [E] or null
  void* packed;           ///< [B * K, packed_rows, d]
  int64_t packed_rows;
  const int32_t* limit;  ///< [B] or null: all R
  bool vectors;          ///< input and weight: 16 bytes at a time
};
struct ProjectArguments {
  Element type;
  Chosen chosen;
  int64_t width;  ///< d
  int parts;
  ProjectPart part[kMaxParts];
  bool warpgroups;  ///< by warpgroup products if the device has them
};

/// output[b, l, :] = bias + sum over parts p and chosen slots of
/// factor * packed_p[first[b] + n, l, :] weight[:, p E + h d .. + d]'.
struct CombinePart {
  const void* packed;  ///< [B * K, packed_rows, d]
  int64_t packed_rows;
  const int32_t* limit;  ///< [B] or null: rows at and after it count as zero
};
struct CombineArguments {
  Element type;
  Chosen chosen;
  int64_t width, rows, columns;  ///< d, R, columns of the output
  int parts;
  CombinePart part[kMaxParts];
  const void* weight;  ///< [columns, parts * H * d]
  int64_t weight_stride;
  const void* factor;  ///< [B, H] in accumulator type, or null: 1
  const void* bias;    ///< [columns] or null
  void* output;        ///< [B, R, columns]
  bool vectors;        ///< packed and weight
  bool warpgroups;     ///< as above
};

/// partial[z, p, h d + c, j] = sum over the slots of head h and over rows l of split z of
/// factor * packed_p[row, l, c] input_p[b, l, j]: the gradient of a weight, to be summed over z.
/// sums[z, p, h d + c], if wanted, is the same with 1 for the input: the gradient of a bias.
struct OuterPart {
  const void* packed;  ///< [B * K, packed_rows, d]
  int64_t packed_rows;
  Rows input;  ///< [B, R, columns]
  int64_t rows;
  const int32_t* limit;  ///< [B] or null
};
struct OuterArguments {
  Element type;
  Chosen chosen;
  int64_t width, columns;
  int parts, splits;
  OuterPart part[kMaxParts];
  const void* factor;  ///< [B, H] in accumulator type, or null
  bool rounded;        ///< partial and sums are of the elements' type, else of the accumulators'
  void* partial;       ///< [splits, parts, H * d, columns]
  void* sums;          ///< [splits, parts, H * d] or null
  bool vectors;
};

int project(const ProjectArguments& a, Stream stream);
int combine(const CombineArguments& a, Stream stream);
int outer(const OuterArguments& a, Stream stream);

HEADWISE_HOST_DEVICE int64_t tiles_of(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

/// Blocks of project: column tiles fastest, then parts, row tiles, sequences, so that blocks which
/// run together share rows of the input. The grid has room for K heads per sequence; tiles beyond
/// count[b] * d are empty.
struct ProjectTile {
  int64_t b, row, column;
  int part;
};
HEADWISE_HOST_DEVICE int64_t project_rows(const ProjectArguments& a) {
  int64_t rows = 0;
  for (int p = 0; p < a.parts; ++p) rows = rows < a.part[p].rows ? a.part[p].rows : rows;
  return rows;
}
HEADWISE_HOST_DEVICE bool all_vectors(const ProjectArguments& a) {
  bool all = true;
  for (int p = 0; p < a.parts; ++p) all = all && a.part[p].vectors;
  return all;
}
HEADWISE_HOST_DEVICE int64_t project_blocks(const ProjectArguments& a, int64_t m, int64_t n) {
  return a.chosen.batch * tiles_of(project_rows(a), m) * a.parts *
         tiles_of(a.chosen.columns * a.width, n);
}
HEADWISE_HOST_DEVICE ProjectTile project_tile(const ProjectArguments& a, int64_t block, int64_t m,
                                              int64_t n) {
  const int64_t column_tiles = tiles_of(a.chosen.columns * a.width, n);
  const int64_t row_tiles = tiles_of(project_rows(a), m);
  const int64_t column = block % column_tiles, rest = block / column_tiles;
  const int64_t rows = rest / a.parts;
  return {rows / row_tiles, rows % row_tiles * m, column * n, static_cast<int>(rest % a.parts)};
}

/// Blocks of combine: column tiles fastest, then row tiles, then sequences.
struct CombineTile {
  int64_t b, row, column;
};
HEADWISE_HOST_DEVICE int64_t combine_blocks(const CombineArguments& a, int64_t m, int64_t n) {
  return a.chosen.batch * tiles_of(a.rows, m) * tiles_of(a.columns, n);
}
HEADWISE_HOST_DEVICE CombineTile combine_tile(const CombineArguments& a, int64_t block, int64_t m,
                                              int64_t n) {
  const int64_t column_tiles = tiles_of(a.columns, n), row_tiles = tiles_of(a.rows, m);
  const int64_t rest = block / column_tiles;
  return {rest / row_tiles, rest % row_tiles * m, block % column_tiles * n};
}

/// The terms of combine's sum: `pieces` pieces of k columns per head, heads of one part after
/// another.
struct CombineStep {
  int part;
  int64_t n, column;  ///< place in the row of the index, first column within the head
};
HEADWISE_HOST_DEVICE int64_t combine_steps(const CombineArguments& a, int64_t count, int64_t k) {
  return a.parts * count * tiles_of(a.width, k);
}
/// In 32 bits: it is asked for at every step, and a division in 64 bits takes as long as a step.
HEADWISE_HOST_DEVICE CombineStep combine_step(const CombineArguments& a, int step, int count,
                                              int k) {
  const unsigned pieces = (static_cast<unsigned>(a.width) + k - 1) / k;
  const unsigned head = static_cast<unsigned>(step) / pieces;
  const unsigned part = head / static_cast<unsigned>(count);
  return {static_cast<int>(part), head - part * count, (step - head * pieces) * k};
}

/// Blocks of outer: column tiles fastest, then tiles of a head's columns, heads, parts, splits.
struct OuterTile {
  int64_t split, h, row, column;
  int part;
};
HEADWISE_HOST_DEVICE int64_t outer_blocks(const OuterArguments& a, int64_t m, int64_t n) {
  return a.splits * a.parts * a.chosen.num_heads * tiles_of(a.width, m) * tiles_of(a.columns, n);
}
HEADWISE_HOST_DEVICE OuterTile outer_tile(const OuterArguments& a, int64_t block, int64_t m,
                                          int64_t n) {
  const int64_t column_tiles = tiles_of(a.columns, n), row_tiles = tiles_of(a.width, m);
  const int64_t rows = block / column_tiles, heads = rows / row_tiles,
                parts = heads / a.chosen.num_heads;
  return {parts / a.parts, heads % a.chosen.num_heads, rows % row_tiles * m,
          block % column_tiles * n, static_cast<int>(parts % a.parts)};
}
/// Rows [first, last) of every sequence that split z sums over, whole steps of k.
struct Range {
  int64_t first, last;
};
HEADWISE_HOST_DEVICE Range split_rows(int64_t rows, int splits, int64_t split, int64_t k) {
  const int64_t size = tiles_of(tiles_of(rows, splits), k) * k;
  const int64_t first = split * size, last = first + size;
  return {first < rows ? first : rows, last < rows ? last : rows};
}

}  // namespace headwise::kernels::cuda

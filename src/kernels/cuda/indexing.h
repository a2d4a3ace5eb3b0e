// Which thread does what, in every CUDA kernel here: plain functions of thread numbers and sizes,
// so that tests/cpp/test_cuda_emulation.cpp runs them thread by thread without a GPU.
#pragma once

#include <cstdint>

#include "kernels/host_device.h"
#include "kernels/selection.h"

namespace headwise::kernels::cuda {

// ---- The work list: the active (sequence, head) pairs, grouped by head, sequences ascending. ----
//
// One block builds it. `slot` is scratch [H * B]: slot[h * B + b] is the place of head h in row b
// of index (b * K + column), or -1. The list follows from a prefix sum over it: thread t counts the
// chosen in its chunk, the block adds those counts up, and each thread writes its chunk's pairs
// from its own offset on. Nothing depends on the order in which threads run.

struct WorkListShape {
  int64_t batch, columns, num_heads;  // index is [batch, columns]

  HEADWISE_HOST_DEVICE int64_t slots() const { return num_heads * batch; }
  HEADWISE_HOST_DEVICE int64_t capacity() const { return batch * columns; }
};

struct WorkListOutput {
  int32_t* batch = nullptr;   // [B * K] sequence of each pair; -1 after the last
  int32_t* head = nullptr;    // [B * K] its head; -1 after the last
  int32_t* offset = nullptr;  // [H + 1] where each head's pairs begin; the last is their number
  // Where not null:
  int32_t* place = nullptr;       // [B * K] place of each pair in index: row * K + column; then -1
  int32_t* place_head = nullptr;  // [B * K] the head of each place of index, -1: not chosen
  int32_t* count = nullptr;       // [B] clamped to [0, K]
  // Rows of packed buffers: those of sequence 0 first, in the order of index, without gaps.
  int32_t* first = nullptr;        // [B + 1] where each sequence begins; the last is their number
  int32_t* packed_head = nullptr;  // [B * K] the head of each row, -1: none
  // The same for attention over rows of many lengths: a chosen pair has `length` of them.
  int64_t length = 0;
  int32_t* begins = nullptr;  // [B * K + 1] where the packed pairs begin; those behind have none
  int32_t* used = nullptr;    // [B, H] length of a chosen pair, 0 of the others
};

HEADWISE_HOST_DEVICE void clear_slots(const WorkListShape& s, int64_t thread, int64_t threads,
                                      int32_t* slot, const WorkListOutput& out) {
  for (int64_t i = thread; i < s.slots(); i += threads) {
    slot[i] = -1;
    if (out.used) out.used[i] = 0;
  }
}

/// True if place i of index names a head that an earlier place of its row names.
template <typename Index>
HEADWISE_HOST_DEVICE bool repeats(const WorkListShape& s, const Index* index, int64_t i) {
  bool found = false;
  for (int64_t n = i - i % s.columns; n < i; ++n) found |= index[n] == index[i];
  return found;
}

/// Heads out of range and repeats, which only the host reports, are left out.
template <typename Index>
HEADWISE_HOST_DEVICE void mark_slots(const WorkListShape& s, int64_t thread, int64_t threads,
                                     const Index* index, const Index* count, int32_t* slot,
                                     const WorkListOutput& out) {
  for (int64_t i = thread; i < s.capacity(); i += threads) {
    const int64_t b = i / s.columns, column = i % s.columns;
    const int64_t h = index[i];
    const bool chosen = column < clamp_count(count[b], s.columns) && h >= 0 && h < s.num_heads &&
                        !repeats(s, index, i);
    if (chosen) slot[h * s.batch + b] = static_cast<int32_t>(i);
    if (chosen && out.used) out.used[b * s.num_heads + h] = static_cast<int32_t>(out.length);
    if (out.place_head) out.place_head[i] = chosen ? static_cast<int32_t>(h) : -1;
  }
  if (out.count)
    for (int64_t b = thread; b < s.batch; b += threads)
      out.count[b] = static_cast<int32_t>(clamp_count(count[b], s.columns));
}

HEADWISE_HOST_DEVICE int64_t chunk_begin(int64_t thread, int64_t threads, int64_t size) {
  const int64_t chunk = (size + threads - 1) / threads;
  const int64_t begin = thread * chunk;
  return begin < size ? begin : size;
}

HEADWISE_HOST_DEVICE int32_t count_chunk(const WorkListShape& s, int64_t thread, int64_t threads,
                                         const int32_t* slot) {
  const int64_t end = chunk_begin(thread + 1, threads, s.slots());
  int32_t chosen = 0;
  for (int64_t i = chunk_begin(thread, threads, s.slots()); i < end; ++i) chosen += slot[i] >= 0;
  return chosen;
}

/// The packed rows of the thread's chunk of the sequences.
template <typename Index>
HEADWISE_HOST_DEVICE int32_t count_rows(const WorkListShape& s, int64_t thread, int64_t threads,
                                        const Index* count) {
  const int64_t end = chunk_begin(thread + 1, threads, s.batch);
  int32_t rows = 0;
  for (int64_t b = chunk_begin(thread, threads, s.batch); b < end; ++b)
    rows += static_cast<int32_t>(clamp_count(count[b], s.columns));
  return rows;
}
/// `at` = number of rows in the chunks of lower threads; `total` of all.
template <typename Index>
HEADWISE_HOST_DEVICE void write_rows(const WorkListShape& s, int64_t thread, int64_t threads,
                                     const Index* count, int32_t at, int32_t total,
                                     const WorkListOutput& out) {
  if (!out.first) return;
  const int64_t end = chunk_begin(thread + 1, threads, s.batch);
  for (int64_t b = chunk_begin(thread, threads, s.batch); b < end; ++b) {
    out.first[b] = at;
    at += static_cast<int32_t>(clamp_count(count[b], s.columns));
  }
  if (thread == 0) out.first[s.batch] = total;
}
/// After write_rows() of all threads.
HEADWISE_HOST_DEVICE void write_packed_heads(const WorkListShape& s, int64_t thread,
                                             int64_t threads, int32_t total,
                                             const WorkListOutput& out) {
  if (out.begins)
    for (int64_t i = thread; i <= s.capacity(); i += threads)
      out.begins[i] = static_cast<int32_t>((i < total ? i : total) * out.length);
  if (!out.packed_head) return;
  for (int64_t i = thread; i < s.capacity(); i += threads) {
    const int64_t b = i / s.columns, column = i % s.columns;
    if (column < out.count[b]) out.packed_head[out.first[b] + column] = out.place_head[i];
    if (i >= total) out.packed_head[i] = -1;
  }
}

/// `at` = number of pairs in the chunks of lower threads; `total` of all.
HEADWISE_HOST_DEVICE void write_chunk(const WorkListShape& s, int64_t thread, int64_t threads,
                                      const int32_t* slot, int32_t at, int32_t total,
                                      const WorkListOutput& out) {
  const int64_t end = chunk_begin(thread + 1, threads, s.slots());
  for (int64_t i = chunk_begin(thread, threads, s.slots()); i < end; ++i) {
    if (i % s.batch == 0) out.offset[i / s.batch] = at;
    if (slot[i] < 0) continue;
    out.batch[at] = static_cast<int32_t>(i % s.batch);
    out.head[at] = static_cast<int32_t>(i / s.batch);
    if (out.place) out.place[at] = slot[i];
    ++at;
  }
  for (int64_t i = total + thread; i < s.capacity(); i += threads) {
    out.batch[i] = out.head[i] = -1;
    if (out.place) out.place[i] = -1;
  }
  if (thread == 0) out.offset[s.num_heads] = total;
  if (s.batch == 0)
    for (int64_t h = thread; h < s.num_heads; h += threads) out.offset[h] = 0;
}

/// The effect of key_padding_mask on a thread's share of the keys [0, S) of one sequence: keys at
/// and after `end` are hidden (over threads: the largest), `plain` keys are unchanged (the sum).
struct VisibleKeys {
  int32_t end, plain;
};
template <typename Hidden, typename Plain>
HEADWISE_HOST_DEVICE VisibleKeys visible_keys(const Hidden& hidden, const Plain& plain,
                                              int64_t keys, int64_t thread, int64_t threads) {
  VisibleKeys seen{0, 0};
  for (int64_t j = thread; j < keys; j += threads) {
    if (!hidden(j)) seen.end = static_cast<int32_t>(j + 1);
    if (plain(j)) ++seen.plain;
  }
  return seen;
}

// ---- Copying the active heads of [B, Hs, R, w] to and from packed [N, R, w]. ----

struct HeadCopyShape {
  int64_t rows, width;  // R, w of a head
  int64_t group;        // query heads that share a head of the tensor
  int64_t batch_stride, head_stride, row_stride, column_stride;  // of [B, Hs, R, w], in elements

  /// Element of [B, Hs, R, w] that element i of the packed tensor is a copy of.
  HEADWISE_HOST_DEVICE int64_t offset(int64_t i, const int32_t* batch, const int32_t* head) const {
    const int64_t column = i % width, row = i / width % rows, pair = i / (width * rows);
    return batch[pair] * batch_stride + head[pair] / group * head_stride + row * row_stride +
           column * column_stride;
  }
};

// ---- Tiles of attention statistics. ----
//
// A block owns kTileRows query rows of one (sequence, head) and walks the keys kTileKeys at a time.
// kLanes threads share a query row; each holds the scores of every kLanes-th key of the tile.

constexpr int kTileRows = 16, kTileKeys = 32, kLanes = 8, kTileWidth = 32;
constexpr int kStatisticsThreads = kTileRows * kLanes;

struct StatisticsTile {
  int64_t b, h, first_row;
};

HEADWISE_HOST_DEVICE int64_t statistics_row_tiles(int64_t queries) {
  return (queries + kTileRows - 1) / kTileRows;
}

HEADWISE_HOST_DEVICE StatisticsTile statistics_tile(int64_t block, int64_t num_heads,
                                                    int64_t queries) {
  const int64_t tiles = statistics_row_tiles(queries);
  const int64_t pair = block / tiles;
  return {pair / num_heads, pair % num_heads, block % tiles * kTileRows};
}

/// Keys that some row of the tile may see.
HEADWISE_HOST_DEVICE int64_t statistics_keys(const StatisticsTile& tile, int64_t keys,
                                             bool causal) {
  const int64_t seen = tile.first_row + kTileRows;
  return causal && seen < keys ? seen : keys;
}

}  // namespace headwise::kernels::cuda

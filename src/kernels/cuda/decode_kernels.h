// The kernels behind decode.h.
#pragma once

#include "kernels/cuda/attention_plain.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/device.h"

namespace headwise::kernels::cuda {

/// Columns [column, column + 8) of a row as they lie in memory.
template <typename T>
struct alignas(16) Raw {
  T values[kPiece];
};
/// Zeros beyond `width`, or if row is null.
template <typename T>
HEADWISE_DEVICE Raw<T> read_raw(const T* row, int64_t column, int64_t width, bool vectors) {
  if (row && vectors && column + kPiece <= width)
    return *reinterpret_cast<const Raw<T>*>(row + column);
  Raw<T> raw;
#pragma unroll
  for (int c = 0; c < kPiece; ++c)
    raw.values[c] = row && column + c < width ? row[column + c] : static_cast<T>(0.f);
  return raw;
}
template <typename T, typename C>
HEADWISE_DEVICE void convert(C (&to)[kPiece], const Raw<T>& raw) {
#pragma unroll
  for (int c = 0; c < kPiece; ++c) to[c] = static_cast<C>(raw.values[c]);
}

/// Running softmax of some keys: merge() joins those of disjoint sets of keys.
template <typename C>
struct Running {
  C maximum = -static_cast<C>(INFINITY), sum = 0, values[kPiece] = {};

  /// Factors of two sets under their common maximum.
  HEADWISE_DEVICE static void factors(C a, C b, C& together, C& of_a, C& of_b) {
    together = a > b || a != a ? a : b;
    const C base = together == -static_cast<C>(INFINITY) ? C(0) : together;
    of_a = exp(a - base), of_b = exp(b - base);
  }
  HEADWISE_DEVICE void merge(const Running& other) {
    C together, own, others;
    factors(maximum, other.maximum, together, own, others);
    maximum = together;
    sum = own * sum + others * other.sum;
#pragma unroll
    for (int c = 0; c < kPiece; ++c) values[c] = own * values[c] + others * other.values[c];
  }
};

/// kLanes lanes read one key or value: 8 kLanes columns at most.
template <typename T, int kLanes>
struct DecodeKernel {
  using C = Accumulator<T>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarp / kLanes;                     // keys of a warp at once,
  static constexpr int kAtOnce = 8 / static_cast<int>(sizeof(T));  // this many times in flight
  static constexpr int64_t kStep = kWarps * kRows;
  static constexpr int64_t kHeadList = 16 + kDecodeHeads * sizeof(int32_t);
  static constexpr int64_t kShared = kHeadList + int64_t{kWarps} * kWarp * (kPiece + 2) * sizeof(C);
  PairAttentionArguments a;
  DecodeShape shape;
  C* partial;

  /// The heads of this pass: chosen ones that read the key/value head, in the order of the index.
  HEADWISE_DEVICE int find_heads(const DecodeTile& tile, int32_t* list) const {
    const auto& chosen = a.chosen;
    int32_t* const total = list + kDecodeHeads;
    if (warp_index() == 0) {
      int found = 0;
      for (int64_t first = 0; first < chosen.columns; first += kWarp) {
        const int64_t n = first + lane_index();
        const auto h = static_cast<int32_t>(decode_head(chosen, tile.b, n));
        const bool ours = h >= 0 && h / a.group == tile.kv_head;
        const uint32_t bits = ballot(ours);
        const int64_t place =
            found + count_bits(bits & ((1u << lane_index()) - 1)) - tile.pass * kDecodeHeads;
        found += count_bits(bits);
        if (ours && place >= 0 && place < kDecodeHeads) list[place] = h;
      }
      if (lane_index() == 0) *total = found;
    }
    barrier();
    const int64_t left = *total - tile.pass * kDecodeHeads;
    return static_cast<int>(left < 0 ? 0 : (left < kDecodeHeads ? left : kDecodeHeads));
  }

  /// What a lane has read of kAtOnce keys and values.
  struct Pieces {
    Raw<T> keys[kAtOnce], values[kAtOnce];
  };

  HEADWISE_DEVICE void operator()() const {
    const auto tile = decode_tile(a, shape, block_index());
    int32_t* const list = reinterpret_cast<int32_t*>(shared_memory());
    const int heads = find_heads(tile, list);
    if (heads == 0) return;  // the whole block
    const int64_t column = lane_index() % kLanes * kPiece;
    C query[kDecodeHeads][kPiece];
    Running<C> running[kDecodeHeads];
#pragma unroll
    for (int g = 0; g < kDecodeHeads; ++g)
      convert(query[g], read_raw(g < heads ? unit_row<T>(a.q, tile.b, list[g], 0) : nullptr, column,
                                 a.width, a.vectors));
    // Masks that depend on the head (attn_mask) are read under each head.
    const Pair first_pair{tile.b, 0, list[0]};
    const auto view = key_view(a, first_pair);
    const int64_t begin = tile.split * shape.keys_each;
    const int64_t last = begin + shape.keys_each, visible = keys_end(a, view, 1);
    const int64_t end = last < visible ? last : visible;
    const bool plain = unmasked(a, view, 0, end);
    const C scale = static_cast<C>(a.scale);
    const auto load = [&](int64_t at) {
      Pieces pieces;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int64_t j = at + lane_index() / kLanes + n * kStep;
        const bool read = j < end && !key_hidden(a, view, first_pair, j);
        pieces.keys[n] = read_raw(read ? unit_row<T>(a.k, tile.b, tile.kv_head, j) : nullptr,
                                  column, a.width, a.vectors);
        pieces.values[n] = read_raw(read ? unit_row<T>(a.v, tile.b, tile.kv_head, j) : nullptr,
                                    column, a.value_width, a.vectors);
      }
      return pieces;
    };
    int64_t at = begin + warp_index() * kRows;
    Pieces pieces = load(at);
    for (; at < end; at += kAtOnce * kStep) {
      const Pieces next = load(at + kAtOnce * kStep);  // on its way during the arithmetic
      C score[kDecodeHeads][kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        C key[kPiece];
        convert(key, pieces.keys[n]);
        const int64_t j = at + lane_index() / kLanes + n * kStep;
#pragma unroll
        for (int g = 0; g < kDecodeHeads; ++g) {
          if (g >= heads) break;  // the whole block
          C sum = 0;
#pragma unroll
          for (int c = 0; c < kPiece; ++c) sum += query[g][c] * key[c];
#pragma unroll
          for (int d = 1; d < kLanes; d *= 2) sum += shuffle_xor(sum, d);
          score[g][n] = scale * sum;
          if (j >= end)
            score[g][n] = -static_cast<C>(INFINITY);
          else if (!plain)
            score[g][n] = masked_score(a, view, Pair{tile.b, 0, list[g]}, 0, j, score[g][n]);
        }
      }
#pragma unroll
      for (int g = 0; g < kDecodeHeads; ++g) {
        if (g >= heads) break;
        C highest = running[g].maximum;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          if (score[g][n] > highest || score[g][n] != score[g][n]) highest = score[g][n];
        const C base = highest == -static_cast<C>(INFINITY) ? C(0) : highest;
        const C shrink = exp(running[g].maximum - base);
        running[g].maximum = highest;
        running[g].sum *= shrink;
#pragma unroll
        for (int c = 0; c < kPiece; ++c) running[g].values[c] *= shrink;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          score[g][n] = exp(score[g][n] - base);
          running[g].sum += score[g][n];
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        C value[kPiece];
        convert(value, pieces.values[n]);
#pragma unroll
        for (int g = 0; g < kDecodeHeads; ++g) {
          if (g >= heads) break;
#pragma unroll
          for (int c = 0; c < kPiece; ++c) running[g].values[c] += score[g][n] * value[c];
        }
      }
      pieces = next;
    }
    C* const meeting = reinterpret_cast<C*>(shared_memory() + kHeadList);
    for (int g = 0; g < heads; ++g) {
      Running<C> own = pick(running, g);
#pragma unroll
      for (int d = kLanes; d < kWarp; d *= 2) {  // the rows of a warp
        Running<C> other;
        other.maximum = shuffle_xor(own.maximum, d);
        other.sum = shuffle_xor(own.sum, d);
#pragma unroll
        for (int c = 0; c < kPiece; ++c) other.values[c] = shuffle_xor(own.values[c], d);
        own.merge(other);
      }
      barrier();  // the head before has been read
      C* const mine = meeting + (warp_index() * kWarp + lane_index()) * (kPiece + 2);
      mine[0] = own.maximum, mine[1] = own.sum;
#pragma unroll
      for (int c = 0; c < kPiece; ++c) mine[2 + c] = own.values[c];
      barrier();
      if (warp_index() == 0 && lane_index() < kLanes) {
        for (int w = 1; w < kWarps; ++w) {
          const C* const theirs = meeting + (w * kWarp + lane_index()) * (kPiece + 2);
          Running<C> other;
          other.maximum = theirs[0], other.sum = theirs[1];
#pragma unroll
          for (int c = 0; c < kPiece; ++c) other.values[c] = theirs[2 + c];
          own.merge(other);
        }
        C* const row = partial + decode_row(a, shape, tile.b, list[g], tile.split);
        if (lane_index() == 0) row[0] = own.maximum, row[1] = own.sum;
#pragma unroll
        for (int c = 0; c < kPiece; ++c)
          if (column + c < a.value_width) row[2 + column + c] = own.values[c];
      }
    }
  }

 private:
  /// running[g] without an index that would move the array out of registers.
  HEADWISE_DEVICE static Running<C> pick(const Running<C> (&running)[kDecodeHeads], int g) {
    Running<C> own = running[0];
#pragma unroll
    for (int n = 1; n < kDecodeHeads; ++n)
      if (n == g) own = running[n];
    return own;
  }
};

/// One block per place of the index: merges the splits, each warp a share of them.
template <typename T>
struct DecodeMerge {
  using C = Accumulator<T>;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int64_t kShared = kWarps * (kWidestHead + 2) * sizeof(C);
  PairAttentionArguments a;
  DecodeShape shape;
  const C* partial;

  HEADWISE_DEVICE static C highest(C x, C y) { return y > x || y != y ? y : x; }

  HEADWISE_DEVICE void operator()() const {
    const int64_t columns = a.chosen.columns, b = block_index() / columns;
    const Pair pair{b, 0, decode_head(a.chosen, b, block_index() % columns)};
    if (pair.h < 0) return;                                   // the whole block
    C* const maxima = reinterpret_cast<C*>(shared_memory());  // [kWarps]
    C* const sums = maxima + kWarps;                          // [kWarps]
    C* const values = sums + kWarps;                          // [kWarps][kWidestHead]
    const C* const first = partial + decode_row(a, shape, pair.b, pair.h, 0);
    const int64_t row_size = a.value_width + 2;
    C maximum = -static_cast<C>(INFINITY);
    for (int64_t s = thread_index(); s < shape.splits; s += kThreads)
      maximum = highest(maximum, first[s * row_size]);
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) maximum = highest(maximum, shuffle_xor(maximum, d));
    if (lane_index() == 0) maxima[warp_index()] = maximum;
    barrier();
    for (int w = 0; w < kWarps; ++w) maximum = highest(maximum, maxima[w]);
    const C base = maximum == -static_cast<C>(INFINITY) ? C(0) : maximum;
    C sum = 0, own[kOwn] = {};
#pragma unroll 4
    for (int64_t s = warp_index(); s < shape.splits; s += kWarps) {
      const C* const row = first + s * row_size;
      const C factor = exp(row[0] - base);
      sum += factor * row[1];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const int64_t c = lane_index() + m * kWarp;
        if (c < a.value_width) own[m] += factor * row[2 + c];
      }
    }
    if (lane_index() == 0) sums[warp_index()] = sum;
#pragma unroll
    for (int m = 0; m < kOwn; ++m)
      values[warp_index() * kWidestHead + lane_index() + m * kWarp] = own[m];
    barrier();
    sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w];
    const bool blind = sum == C(0);
    const C inverse = blind ? C(0) : C(1) / sum;
    const C weight =
        a.weight ? static_cast<const C*>(a.weight)[pair.b * a.chosen.num_heads + pair.h] : C(1);
    for (int64_t c = thread_index(); c < a.value_width; c += kThreads) {
      C total = 0;
      for (int w = 0; w < kWarps; ++w) total += values[w * kWidestHead + c];
      written_row<T>(a.context, pair.b, pair.h, 0)[c] = static_cast<T>(inverse * total);
      if (a.weighted.data)
        written_row<T>(a.weighted, pair.b, pair.h, 0)[c] = static_cast<T>(inverse * weight * total);
    }
    if (thread_index() == 0)
      static_cast<C*>(a.lse)[pair.row(a, 0)] =
          blind ? static_cast<C>(INFINITY) : maximum + log(sum);
  }
};

}  // namespace headwise::kernels::cuda

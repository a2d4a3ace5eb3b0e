// The kernels behind decode.h.
#pragma once

#include "kernels/cuda/attention_plain.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/device.h"

namespace headwise::kernels::cuda {

constexpr int kPiece = 8;  // columns of a row that a lane reads

/// Columns [column, column + 8) of a row of `width`; zeros beyond it, or where row is null.
template <typename T, typename C>
HEADWISE_DEVICE void read_piece(C (&to)[kPiece], const T* row, int64_t column, int64_t width,
                                bool vectors) {
  struct alignas(16) Vector {
    T values[16 / sizeof(T)];
  };
  constexpr int kVector = 16 / sizeof(T), kCount = kPiece / kVector;
  if (row && vectors && column + kPiece <= width) {
    Vector pieces[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n)
      pieces[n] = *reinterpret_cast<const Vector*>(row + column + n * kVector);
#pragma unroll
    for (int c = 0; c < kPiece; ++c)
      to[c] = static_cast<C>(pieces[c / kVector].values[c % kVector]);
    return;
  }
#pragma unroll
  for (int c = 0; c < kPiece; ++c)
    to[c] = row && column + c < width ? static_cast<C>(row[column + c]) : C(0);
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

/// Lanes of one row of keys or values, a power of two, so that a warp reads 32 / lanes keys at
/// once.
HEADWISE_HOST_DEVICE int lanes_of(int64_t width) {
  int lanes = 1;
  while (lanes * kPiece < width) lanes *= 2;
  return lanes;
}

template <typename T>
struct DecodeKernel {
  using C = Accumulator<T>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kAtOnce = 4;
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
        const int32_t h = n < chosen.columns ? chosen.head[tile.b * chosen.columns + n] : -1;
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

  HEADWISE_DEVICE void operator()() const {
    const auto tile = decode_tile(a, shape, block_index());
    int32_t* const list = reinterpret_cast<int32_t*>(shared_memory());
    const int heads = find_heads(tile, list);
    if (heads == 0) return;  // the whole block
    const int64_t widest = a.width > a.value_width ? a.width : a.value_width;
    const int lanes = lanes_of(widest), rows = kWarp / lanes;  // keys of a warp at once
    const int64_t column = lane_index() % lanes * kPiece;
    C query[kDecodeHeads][kPiece];
    Running<C> running[kDecodeHeads];
#pragma unroll
    for (int g = 0; g < kDecodeHeads; ++g) {
      const T* row = g < heads ? unit_row<T>(a.q, tile.b, list[g], 0) : nullptr;
      read_piece<T, C>(query[g], row, column, a.width, a.vectors);
    }
    // Masks that depend on the head (attn_mask) are read under each head.
    const Pair first_pair{tile.b, 0, list[0]};
    const auto view = key_view(a, first_pair);
    const int64_t begin = tile.split * shape.keys_each;
    const int64_t end = smaller64(begin + shape.keys_each, keys_end(a, view, 1));
    const int64_t step = kWarps * rows;
    const bool plain = unmasked(a, view, 0, end);
    for (int64_t at = begin + warp_index() * rows; at < end; at += kAtOnce * step) {
      C keys[kAtOnce][kPiece], values[kAtOnce][kPiece];
      const int64_t own = at + lane_index() / lanes;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int64_t j = own + n * step;
        const bool read = j < end && !key_hidden(a, view, first_pair, j);
        read_piece<T, C>(keys[n], read ? unit_row<T>(a.k, tile.b, tile.kv_head, j) : nullptr,
                         column, a.width, a.vectors);
        read_piece<T, C>(values[n], read ? unit_row<T>(a.v, tile.b, tile.kv_head, j) : nullptr,
                         column, a.value_width, a.vectors);
      }
#pragma unroll
      for (int g = 0; g < kDecodeHeads; ++g) {
        if (g >= heads) break;  // the whole block
        const Pair pair{tile.b, 0, list[g]};
        C score[kAtOnce], highest = running[g].maximum;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          C sum = 0;
#pragma unroll
          for (int c = 0; c < kPiece; ++c) sum += query[g][c] * keys[n][c];
          for (int d = 1; d < lanes; d *= 2) sum += shuffle_xor(sum, d);
          const int64_t j = own + n * step;
          score[n] = static_cast<C>(a.scale) * sum;
          if (j >= end)
            score[n] = -static_cast<C>(INFINITY);
          else if (!plain)
            score[n] = masked_score(a, view, pair, 0, j, score[n]);
          if (score[n] > highest || score[n] != score[n]) highest = score[n];
        }
        const C base = highest == -static_cast<C>(INFINITY) ? C(0) : highest;
        const C shrink = exp(running[g].maximum - base);
        running[g].maximum = highest;
        running[g].sum *= shrink;
#pragma unroll
        for (int c = 0; c < kPiece; ++c) running[g].values[c] *= shrink;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const C p = exp(score[n] - base);
          running[g].sum += p;
#pragma unroll
          for (int c = 0; c < kPiece; ++c) running[g].values[c] += p * values[n][c];
        }
      }
    }
    C* const meeting = reinterpret_cast<C*>(shared_memory() + kHeadList);
    for (int g = 0; g < heads; ++g) {
      Running<C> own = pick(running, g);
      for (int d = lanes; d < kWarp; d *= 2) {  // the rows of a warp
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
      if (warp_index() == 0 && lane_index() < lanes) {
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
  HEADWISE_DEVICE static int64_t smaller64(int64_t x, int64_t y) { return x < y ? x : y; }
  /// running[g] without an index that would move the array out of registers.
  HEADWISE_DEVICE static Running<C> pick(const Running<C> (&running)[kDecodeHeads], int g) {
    Running<C> own = running[0];
#pragma unroll
    for (int n = 1; n < kDecodeHeads; ++n)
      if (n == g) own = running[n];
    return own;
  }
};

/// A warp a chosen head: the splits together.
template <typename T>
struct DecodeMerge {
  using C = Accumulator<T>;
  static constexpr int kThreads = kWarp;
  PairAttentionArguments a;
  DecodeShape shape;
  const C* partial;

  HEADWISE_DEVICE void operator()() const {
    const auto [pair, tile] = pair_tile(a.chosen, block_index(), 1);
    if (pair.h < 0) return;
    C maximum = -static_cast<C>(INFINITY);
    for (int64_t s = lane_index(); s < shape.splits; s += kWarp) {
      const C other = partial[decode_row(a, shape, pair.b, pair.h, s)];
      if (other > maximum || other != other) maximum = other;
    }
    for (int d = 1; d < kWarp; d *= 2) {
      const C other = shuffle_xor(maximum, d);
      if (other > maximum || other != other) maximum = other;
    }
    const C base = maximum == -static_cast<C>(INFINITY) ? C(0) : maximum;
    C sum = 0, values[kOwn] = {};
    for (int64_t s = 0; s < shape.splits; ++s) {
      const C* const row = partial + decode_row(a, shape, pair.b, pair.h, s);
      const C factor = exp(row[0] - base);
      sum += factor * row[1];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const int64_t c = lane_index() + m * kWarp;
        if (c < a.value_width) values[m] += factor * row[2 + c];
      }
    }
    const bool blind = sum == C(0);
    const C inverse = blind ? C(0) : C(1) / sum;
    store_row(values, inverse, written_row<T>(a.context, pair.b, pair.h, 0), a.value_width);
    if (a.weighted.data)
      store_row(values,
                inverse * static_cast<const C*>(a.weight)[pair.b * a.chosen.num_heads + pair.h],
                written_row<T>(a.weighted, pair.b, pair.h, 0), a.value_width);
    if (lane_index() == 0)
      static_cast<C*>(a.lse)[pair.row(a, 0)] =
          blind ? static_cast<C>(INFINITY) : maximum + log(sum);
  }
};

}  // namespace headwise::kernels::cuda

// Attention over chosen pairs with tensor cores: tiles of 64 keys, running softmax in registers
// (Milakov and Gimelshein, arXiv 1805.02867; tiling after Dao, arXiv 2307.08691). The backward is
// two kernels, one that owns queries and one that owns keys: nothing is accumulated with atomics,
// so results do not change from run to run.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_plain.h"
#include "kernels/cuda/tile.h"

namespace headwise::kernels::cuda {

constexpr float kLog2E = 1.44269504088896341f;

/// Sizes for heads of up to kD columns, a multiple of 32. A warp owns 16 rows.
template <int kD_>
struct AttentionTile {
  static constexpr int kD = kD_;
  static constexpr int kStride = kD + 8;  // rows of a matrix fall on different banks
  static constexpr int kKeys = 64;        // forward: keys at a time
  // Gradient of q: a block of every kernel fits in the 99 KiB that the smallest devices give it.
  static constexpr int kBackwardKeys = kD <= 64 ? 64 : 32;
  static constexpr int kForwardThreads = kD <= 64 ? 256 : 128;  // and of the forward
  static constexpr int kThreads = 128;
  static constexpr int kOwnKeys = 64;                  // gradient of k and v: keys per block
  static constexpr int kQueries = kD <= 64 ? 64 : 32;  // and queries at a time
};

/// The rows of a tile of k, v, q or a gradient, by load_tile; rows for which `hidden` is true are
/// zero and not read.
template <typename T, int kRows, int kD, int kThreads, typename Hidden>
HEADWISE_DEVICE void load_rows(T* tile, const Units& units, int64_t b, int64_t unit, int64_t first,
                               int64_t width, bool vectors, const Hidden& hidden) {
  const T* const base = static_cast<const T*>(units.data);
  const T* const row = base + units.offset(b, unit, first);
  load_tile<T, kRows, kD, kD + 8, kThreads>(
      tile, base, [&](int r) { return hidden(first + r) ? nullptr : row + r * units.row_stride; },
      static_cast<int>(width), vectors);
}

/// c [16 m, kN] += A B': A by its fragments, B [kN][kD] in shared memory.
template <typename T, int kN, int kD>
HEADWISE_DEVICE void multiply_rows(float (&c)[kN / 8][4], const uint32_t (&a)[kD / 16][4],
                                   const T* b) {
#pragma unroll
  for (int k = 0; k < kD / 16; ++k)
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t right[4];
      load_right(right, b + n * (kD + 8) + 16 * k, kD + 8);
      multiply_accumulate<T>(c[n / 8], a[k], right[0], right[1]);
      multiply_accumulate<T>(c[n / 8 + 1], a[k], right[2], right[3]);
    }
}

/// c [16, kD] += P B: P [16, kN] as the accumulators of an earlier product, B [kN][kD].
template <typename T, int kN, int kD>
HEADWISE_DEVICE void multiply_columns(float (&c)[kD / 8][4], const float (&p)[kN / 8][4],
                                      const T* b) {
  warp_barrier();  // lanes may have diverged in masks and dropout
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) {
    // The layout of two accumulators side by side is that of one left fragment.
    const uint32_t left[4] = {pack<T>(p[2 * k][0], p[2 * k][1]), pack<T>(p[2 * k][2], p[2 * k][3]),
                              pack<T>(p[2 * k + 1][0], p[2 * k + 1][1]),
                              pack<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kD; n += 16) {
      uint32_t right[4];
      load_right_transposed(right, b + 16 * k * (kD + 8) + n, kD + 8);
      multiply_accumulate<T>(c[n / 8], left, right[0], right[1]);
      multiply_accumulate<T>(c[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

/// Fragments of 16 rows of a tile [.][kD].
template <typename T, int kD>
HEADWISE_DEVICE void load_fragments(uint32_t (&a)[kD / 16][4], const T* tile) {
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) load_left(a[k], tile + 16 * k, kD + 8);
}

/// Rows g and g + 8 of an accumulator to global memory, times a factor each.
template <typename T, int kD>
HEADWISE_DEVICE void store_rows(const float (&c)[kD / 8][4], const float (&factor)[2],
                                const Units& units, int64_t b, int64_t unit, int64_t first,
                                int64_t rows, int64_t width) {
  const bool pairs = width % 2 == 0 && units.row_stride % 2 == 0 && units.unit_stride % 2 == 0 &&
                     units.batch_stride % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = first + lane_index() / 4 + 8 * half;
    if (i >= rows) continue;
    T* const row = written_row<T>(units, b, unit, i);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
      store_pair<T>(row, 8 * n + 2 * (lane_index() % 4), width, c[n][2 * half] * factor[half],
                    c[n][2 * half + 1] * factor[half], pairs);
  }
}

template <typename T, typename Tile>
struct TensorForward {
  static constexpr int kThreads = Tile::kForwardThreads, kRows = kThreads / 2, kResident = 2,
                       kD = Tile::kD, kKeys = Tile::kKeys, kStride = Tile::kStride;
  static constexpr int64_t kShared = int64_t{kRows + 4 * kKeys} * kStride * sizeof(T);
  PairAttentionArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto work = pair_tile(a.chosen, block_index(), tiles_of(a.queries, kRows));
    const Pair pair = work.pair;
    if (pair.h < 0) return;  // the whole block
    const auto view = key_view(a, pair);
    const Dropout<float> dropout(a, pair);
    const int64_t unit = pair.unit(a), kv = pair.kv_unit(a), first = work.tile * kRows;
    T* const q = reinterpret_cast<T*>(shared_memory());
    T* const k = q + kRows * kStride;
    T* const v = k + 2 * kKeys * kStride;
    const int64_t end = keys_end(a, view, smaller(first + kRows, a.queries));
    const auto load = [&](int step, int stage) {
      const auto hidden = [&](int64_t j) { return key_hidden(a, view, pair, j); };
      load_rows<T, kKeys, kD, kThreads>(k + stage * kKeys * kStride, a.k, pair.b, kv,
                                        int64_t{step} * kKeys, a.width, a.vectors, hidden);
      load_rows<T, kKeys, kD, kThreads>(v + stage * kKeys * kStride, a.v, pair.b, kv,
                                        int64_t{step} * kKeys, a.value_width, a.vectors, hidden);
    };
    load_rows<T, kRows, kD, kThreads>(q, a.q, pair.b, unit, first, a.width, a.vectors,
                                      [&](int64_t i) { return i >= a.queries; });

    const int own = warp_index() * 16;                   // first row of this warp in the tile
    const int64_t row = first + own + lane_index() / 4;  // of accumulators 0 and 1
    const bool active = first + own < a.queries;
    const float scale = static_cast<float>(a.scale);
    uint32_t queries[kD / 16][4];
    float context[kD / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    pipeline<2>(tiles_of(end, kKeys), load, [&](int step, int stage) {
      if (!active) return;
      if (step == 0) load_fragments<T, kD>(queries, q + own * kStride);
      const int64_t first_key = int64_t{step} * kKeys;
      float s[kKeys / 8][4] = {};
      multiply_rows<T, kKeys, kD>(s, queries, k + stage * kKeys * kStride);
      // Products that need no mask are scaled on their way into the exponent; not by a negative
      // number, which would turn the largest into the smallest.
      const bool plain = scale >= 0 && unmasked(a, view, first + own, first_key + kKeys);
      float highest[2] = {-INFINITY, -INFINITY};
      if (!plain) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            s[n][e] =
                masked_score(a, view, pair, row + 8 * (e / 2),
                             first_key + 8 * n + 2 * (lane_index() % 4) + e % 2, scale * s[n][e]);
      }
      const float left = plain ? scale : 1.f, exponent = left * kLog2E;
      // A NaN is no maximum, but reaches the sum and the output through its own exponential.
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) highest[e / 2] = larger(highest[e / 2], s[n][e]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (int d = 1; d < 4; d *= 2)
          highest[half] = larger(highest[half], shuffle_xor(highest[half], d));
        // Nothing seen: 0 times the scale would be a score like any other.
        highest[half] = highest[half] == -INFINITY ? maximum[half]
                                                   : larger(maximum[half], left * highest[half]);
        const float base = highest[half] == -INFINITY ? 0.f : highest[half];
        const float shrink = power_of_two((maximum[half] - base) * kLog2E);
        const float shift = -base * kLog2E;
        maximum[half] = highest[half];
        float added = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[n][e] = power_of_two(multiply_add(s[n][e], exponent, shift));
            added += s[n][e];
            if (dropout.on)
              s[n][e] *=
                  dropout(row + 8 * half, first_key + 8 * n + 2 * (lane_index() % 4) + e % 2);
          }
        sum[half] = sum[half] * shrink + added;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          context[n][2 * half] *= shrink;
          context[n][2 * half + 1] *= shrink;
        }
      }
      multiply_columns<T, kKeys, kD>(context, s, v + stage * kKeys * kStride);
    });
    if (!active) return;
    const float weight =
        a.weight ? static_cast<const float*>(a.weight)[pair.b * a.chosen.num_heads + pair.h] : 1.f;
    float inverse[2], weighted[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int d = 1; d < 4; d *= 2) sum[half] += shuffle_xor(sum[half], d);
      const bool blind = sum[half] == 0;
      inverse[half] = blind ? 0.f : 1 / sum[half];
      weighted[half] = inverse[half] * weight;
      const int64_t i = row + 8 * half;
      if (lane_index() % 4 == 0 && i < a.queries)
        static_cast<float*>(a.lse)[pair.row(a, i)] =
            blind ? INFINITY : maximum[half] + logf(sum[half]);
    }
    store_rows<T, kD>(context, inverse, a.context, pair.b, unit, first + own, a.queries,
                      a.value_width);
    if (a.weighted.data)
      store_rows<T, kD>(context, weighted, a.weighted, pair.b, unit, first + own, a.queries,
                        a.value_width);
  }
};

/// What is added to a score, in powers of two, to make it a probability: 0 of a row outside.
HEADWISE_DEVICE float lse_shift(const PairAttentionArguments& a, const Pair& pair, int64_t i) {
  return i < a.queries ? -kLog2E * static_cast<const float*>(a.lse)[pair.row(a, i)] : -INFINITY;
}

/// Owns queries: gradients of q and of the mask.
template <typename T, typename Tile>
struct TensorBackwardQuery {
  static constexpr int kThreads = Tile::kThreads, kD = Tile::kD, kRows = 64,
                       kKeys = Tile::kBackwardKeys, kStride = Tile::kStride;
  static constexpr int64_t kShared = int64_t{2 * kRows + 4 * kKeys} * kStride * sizeof(T);
  PairAttentionArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto work = pair_tile(a.chosen, block_index(), tiles_of(a.queries, kRows));
    const Pair pair = work.pair;
    if (pair.h < 0) return;
    const auto view = key_view(a, pair);
    const Dropout<float> dropout(a, pair);
    const int64_t unit = pair.unit(a), kv = pair.kv_unit(a), first = work.tile * kRows;
    T* const q = reinterpret_cast<T*>(shared_memory());
    T* const grad = q + kRows * kStride;
    T* const k = grad + kRows * kStride;
    T* const v = k + 2 * kKeys * kStride;
    const int64_t end = keys_end(a, view, smaller(first + kRows, a.queries));
    const auto load = [&](int step, int stage) {
      const auto hidden = [&](int64_t j) { return key_hidden(a, view, pair, j); };
      load_rows<T, kKeys, kD, kThreads>(k + stage * kKeys * kStride, a.k, pair.b, kv,
                                        int64_t{step} * kKeys, a.width, a.vectors, hidden);
      load_rows<T, kKeys, kD, kThreads>(v + stage * kKeys * kStride, a.v, pair.b, kv,
                                        int64_t{step} * kKeys, a.value_width, a.vectors, hidden);
    };
    const auto outside = [&](int64_t i) { return i >= a.queries; };
    load_rows<T, kRows, kD, kThreads>(q, a.q, pair.b, unit, first, a.width, a.vectors, outside);
    load_rows<T, kRows, kD, kThreads>(grad, a.grad_context, pair.b, unit, first, a.value_width,
                                      a.vectors, outside);

    const int own = warp_index() * 16;
    const int64_t row = first + own + lane_index() / 4;
    const bool active = first + own < a.queries;
    const float weight =
        a.weight ? static_cast<const float*>(a.weight)[pair.b * a.chosen.num_heads + pair.h] : 1.f;
    const float scale = static_cast<float>(a.scale);
    float shift[2], delta[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t i = row + 8 * half;
      shift[half] = lse_shift(a, pair, i);
      delta[half] = i < a.queries ? static_cast<const float*>(a.delta)[pair.row(a, i)] : 0.f;
    }
    uint32_t queries[kD / 16][4], grads[kD / 16][4];
    float grad_q[kD / 8][4] = {};
    pipeline<2>(tiles_of(end, kKeys), load, [&](int step, int stage) {
      if (!active) return;
      if (step == 0) {
        load_fragments<T, kD>(queries, q + own * kStride);
        load_fragments<T, kD>(grads, grad + own * kStride);
      }
      const int64_t first_key = int64_t{step} * kKeys;
      float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
      multiply_rows<T, kKeys, kD>(s, queries, k + stage * kKeys * kStride);
      multiply_rows<T, kKeys, kD>(dp, grads, v + stage * kKeys * kStride);
      const bool plain = unmasked(a, view, first + own, first_key + kKeys);
      const float exponent = plain ? scale * kLog2E : kLog2E;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t i = row + 8 * (e / 2);
          const int64_t j = first_key + 8 * n + 2 * (lane_index() % 4) + e % 2;
          if (!plain) s[n][e] = masked_score(a, view, pair, i, j, scale * s[n][e]);
          const float p = power_of_two(multiply_add(s[n][e], exponent, shift[e / 2]));
          const float keep = dropout.on ? dropout(i, j) : 1.f;
          // Where the probability is 0 there is no gradient, whatever is multiplied.
          s[n][e] = p == 0 ? 0.f : weight * p * (keep * dp[n][e] - delta[e / 2]);
          if (a.grad_mask && i < a.queries && j < view.masked)
            static_cast<float*>(a.grad_mask)
                [((pair.b * a.chosen.num_heads + pair.h) * a.queries + i) * view.masked + j] =
                    s[n][e];
        }
      multiply_columns<T, kKeys, kD>(grad_q, s, k + stage * kKeys * kStride);
    });
    if (!active) return;
    store_rows<T, kD>(grad_q, {scale, scale}, a.grad_q, pair.b, unit, first + own, a.queries,
                      a.width);
  }
};

/// Owns keys: gradients of k and v. Scores are transposed, [keys, queries].
template <typename T, typename Tile>
struct TensorBackwardKey {
  static constexpr int kThreads = Tile::kThreads, kD = Tile::kD, kKeys = Tile::kOwnKeys,
                       kQueries = Tile::kQueries, kStride = Tile::kStride;
  // What lse_shift() gives, and delta; twice.
  static constexpr int64_t kRowNumbers = 2 * 2 * kQueries * sizeof(float);
  static constexpr int64_t kShared =
      kRowNumbers + int64_t{2 * kKeys + 4 * kQueries} * kStride * sizeof(T);
  PairAttentionArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto work = pair_tile(a.chosen, block_index(), tiles_of(a.keys, kKeys));
    const Pair pair = work.pair;
    if (pair.h < 0) return;
    const auto view = key_view(a, pair);
    const Dropout<float> dropout(a, pair);
    const int64_t unit = pair.unit(a), kv = pair.kv_unit(a), first = work.tile * kKeys;
    float* const numbers = reinterpret_cast<float*>(shared_memory());
    T* const k = reinterpret_cast<T*>(shared_memory() + kRowNumbers);
    T* const v = k + kKeys * kStride;
    T* const q = v + kKeys * kStride;
    T* const grad = q + 2 * kQueries * kStride;
    const int64_t begin = first_row(a, first) / kQueries;  // the first step
    const bool visible = a.added || first < view.limit;
    const int64_t steps = visible ? tiles_of(a.queries, kQueries) - begin : 0;
    const auto load = [&](int step, int stage) {
      const int64_t from = (begin + step) * kQueries;
      const auto outside = [&](int64_t i) { return i >= a.queries; };
      load_rows<T, kQueries, kD, kThreads>(q + stage * kQueries * kStride, a.q, pair.b, unit, from,
                                           a.width, a.vectors, outside);
      load_rows<T, kQueries, kD, kThreads>(grad + stage * kQueries * kStride, a.grad_context,
                                           pair.b, unit, from, a.value_width, a.vectors, outside);
      float* const shift = numbers + stage * 2 * kQueries;
      for (int n = thread_index(); n < kQueries; n += kThreads) {
        const int64_t i = from + n;
        shift[n] = lse_shift(a, pair, i);
        shift[kQueries + n] =
            i < a.queries ? static_cast<const float*>(a.delta)[pair.row(a, i)] : 0.f;
      }
    };
    const auto hidden = [&](int64_t j) { return key_hidden(a, view, pair, j); };
    load_rows<T, kKeys, kD, kThreads>(k, a.k, pair.b, kv, first, a.width, a.vectors, hidden);
    load_rows<T, kKeys, kD, kThreads>(v, a.v, pair.b, kv, first, a.value_width, a.vectors, hidden);

    const int own = warp_index() * 16;
    const int64_t key = first + own + lane_index() / 4;
    const bool active = first + own < a.keys;
    const float weight =
        a.weight ? static_cast<const float*>(a.weight)[pair.b * a.chosen.num_heads + pair.h] : 1.f;
    const float scale = static_cast<float>(a.scale);
    float grad_k[kD / 8][4] = {}, grad_v[kD / 8][4] = {};
    pipeline<2>(steps, load, [&](int step, int stage) {
      if (!active) return;
      const int64_t from = (begin + step) * kQueries;
      const T* const q_tile = q + stage * kQueries * kStride;
      const T* const grad_tile = grad + stage * kQueries * kStride;
      const float* const shift = numbers + stage * 2 * kQueries;
      float p[kQueries / 8][4] = {}, ds[kQueries / 8][4] = {};
      {
        uint32_t fragments[kD / 16][4];
        load_fragments<T, kD>(fragments, k + own * kStride);
        multiply_rows<T, kQueries, kD>(p, fragments, q_tile);
        load_fragments<T, kD>(fragments, v + own * kStride);
        multiply_rows<T, kQueries, kD>(ds, fragments, grad_tile);
      }
      const bool plain = unmasked(a, view, from, first + kKeys) && from + kQueries <= a.queries;
      const float exponent = plain ? scale * kLog2E : kLog2E;
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = 8 * n + 2 * (lane_index() % 4) + e % 2;
          const int64_t i = from + at, j = key + 8 * (e / 2);
          if (!plain) p[n][e] = masked_score(a, view, pair, i, j, scale * p[n][e]);
          const float probability = power_of_two(multiply_add(p[n][e], exponent, shift[at]));
          const float keep = dropout.on ? dropout(i, j) : 1.f;
          ds[n][e] = probability == 0
                         ? 0.f
                         : weight * probability * (keep * ds[n][e] - shift[kQueries + at]);
          p[n][e] = weight * probability * keep;
        }
      multiply_columns<T, kQueries, kD>(grad_v, p, grad_tile);
      multiply_columns<T, kQueries, kD>(grad_k, ds, q_tile);
    });
    if (!active) return;
    store_rows<T, kD>(grad_k, {scale, scale}, a.grad_k, pair.b, unit, first + own, a.keys, a.width);
    store_rows<T, kD>(grad_v, {1.f, 1.f}, a.grad_v, pair.b, unit, first + own, a.keys,
                      a.value_width);
  }
};

/// run(AttentionTile<...>{}) of the narrowest tile that takes the heads; false if none does.
template <typename Run>
bool with_tile(const PairAttentionArguments& a, const Run& run) {
  const int64_t width = a.width > a.value_width ? a.width : a.value_width;
  if (width <= 32)
    run(AttentionTile<32>{});
  else if (width <= 64)
    run(AttentionTile<64>{});
  else if (width <= 128)
    run(AttentionTile<128>{});
  else
    return false;
  return true;
}

}  // namespace headwise::kernels::cuda

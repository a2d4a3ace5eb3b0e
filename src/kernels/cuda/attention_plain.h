// Attention over chosen pairs in plain arithmetic: one warp per row. For float and double, and for
// heads wider than the tensor-core kernels take.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device.h"

namespace headwise::kernels::cuda {

constexpr int kRowsAtOnce = 4;             // warps per block
constexpr int kOwn = kWidestHead / kWarp;  // columns per lane
constexpr int kDeltaRows = 64;

template <typename C>
HEADWISE_DEVICE C warp_sum(C value) {
  for (int d = 1; d < kWarp; d *= 2) value += shuffle_xor(value, d);
  return value;
}
template <typename C>
HEADWISE_DEVICE C warp_maximum(C value) {
  for (int d = 1; d < kWarp; d *= 2) {
    const C other = shuffle_xor(value, d);
    value = other > value ? other : value;
  }
  return value;
}

template <typename T>
HEADWISE_DEVICE const T* unit_row(const Units& units, int64_t b, int64_t unit, int64_t row) {
  return static_cast<const T*>(units.data) + units.offset(b, unit, row);
}
template <typename T>
HEADWISE_DEVICE T* written_row(const Units& units, int64_t b, int64_t unit, int64_t row) {
  return const_cast<T*>(unit_row<T>(units, b, unit, row));
}

template <typename T, typename C>
HEADWISE_DEVICE C dot(const T* a, const T* b, int64_t width) {
  C sum = 0;
  for (int64_t c = 0; c < width; ++c) sum += static_cast<C>(a[c]) * static_cast<C>(b[c]);
  return sum;
}
/// sum[m] += factor * row[lane + 32 m]
template <typename T, typename C>
HEADWISE_DEVICE void add_row(C (&sum)[kOwn], C factor, const T* row, int64_t width) {
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t c = lane_index() + m * kWarp;
    if (c < width) sum[m] += factor * static_cast<C>(row[c]);
  }
}
template <typename T, typename C>
HEADWISE_DEVICE void store_row(const C (&sum)[kOwn], C factor, T* row, int64_t width) {
#pragma unroll
  for (int m = 0; m < kOwn; ++m) {
    const int64_t c = lane_index() + m * kWarp;
    if (c < width) row[c] = static_cast<T>(factor * sum[m]);
  }
}

constexpr int kPiece = 8;  // columns of a row that a lane reads

/// Columns [column, column + 8) of a row of `width`; zeros beyond it, or if row is null.
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

template <typename T, typename C>
HEADWISE_DEVICE void write_piece(const C (&from)[kPiece], C factor, T* row, int64_t column,
                                 int64_t width, bool vectors) {
  struct alignas(16) Vector {
    T values[16 / sizeof(T)];
  };
  constexpr int kVector = 16 / sizeof(T), kCount = kPiece / kVector;
  if (vectors && column + kPiece <= width) {
    Vector pieces[kCount];
#pragma unroll
    for (int c = 0; c < kPiece; ++c)
      pieces[c / kVector].values[c % kVector] = static_cast<T>(factor * from[c]);
#pragma unroll
    for (int n = 0; n < kCount; ++n)
      *reinterpret_cast<Vector*>(row + column + n * kVector) = pieces[n];
    return;
  }
#pragma unroll
  for (int c = 0; c < kPiece; ++c)
    if (column + c < width) row[column + c] = static_cast<T>(factor * from[c]);
}

/// Lanes that read one row, a power of two: a warp reads 32 / lanes rows at once.
HEADWISE_HOST_DEVICE int lanes_of(int64_t width) {
  int lanes = 1;
  while (lanes * kPiece < width) lanes *= 2;
  return lanes;
}

/// One warp per query: lanes score 32 keys at a time, then each lane sums its columns of the
/// values.
template <typename T>
struct PlainForward {
  using C = Accumulator<T>;
  static constexpr int kThreads = kRowsAtOnce * kWarp;
  PairAttentionArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto [pair, tile] = pair_tile(a.chosen, block_index(), tiles_of(a.queries, kRowsAtOnce));
    const int64_t i = tile * kRowsAtOnce + warp_index();
    if (pair.h < 0 || i >= a.queries) return;  // the whole warp
    const auto view = key_view(a, pair);
    const Dropout<C> dropout(a, pair);
    const int64_t unit = pair.unit(a), kv = pair.kv_unit(a);
    const T* const q = unit_row<T>(a.q, pair.b, unit, i);
    C maximum = -static_cast<C>(INFINITY), sum = 0, context[kOwn] = {};
    for (int64_t first = 0; first < keys_end(a, view, i + 1); first += kWarp) {
      const int64_t j = first + lane_index();
      C score = -static_cast<C>(INFINITY);
      if (!key_hidden(a, view, pair, j))
        score = masked_score(
            a, view, pair, i, j,
            static_cast<C>(a.scale) * dot<T, C>(q, unit_row<T>(a.k, pair.b, kv, j), a.width));
      const C highest = warp_maximum(score > maximum || score != score ? score : maximum);
      // No key seen so far: everything stays zero.
      const C base = highest == -static_cast<C>(INFINITY) ? C(0) : highest;
      // A hidden key stays hidden where another score is NaN: its row may not exist.
      const C p = score == -static_cast<C>(INFINITY) ? C(0) : exp(score - base);
      const C shrink = exp(maximum - base);
      sum = sum * shrink + warp_sum(p);
      maximum = highest;
      for (auto& c : context) c *= shrink;
      const C kept = p * (p != C(0) ? dropout(i, j) : C(1));
      for (int lane = 0; lane < kWarp; ++lane) {
        const C factor = shuffle(kept, lane);
        if (factor != C(0))
          add_row(context, factor, unit_row<T>(a.v, pair.b, kv, first + lane), a.value_width);
      }
    }
    const bool blind = sum == C(0);
    const C inverse = blind ? C(0) : C(1) / sum;
    store_row(context, inverse, written_row<T>(a.context, pair.b, unit, i), a.value_width);
    if (a.weighted.data)
      store_row(context,
                inverse * static_cast<const C*>(a.weight)[pair.b * a.chosen.num_heads + pair.h],
                written_row<T>(a.weighted, pair.b, unit, i), a.value_width);
    if (lane_index() == 0)
      static_cast<C*>(a.lse)[pair.row(a, i)] =
          blind ? static_cast<C>(INFINITY) : maximum + log(sum);
  }
};

/// Probability and gradient of the score of query i and key j, from the rows of both.
template <typename C>
struct ScoreGradient {
  C kept, gradient;
};
template <typename T, typename C>
HEADWISE_DEVICE ScoreGradient<C> score_gradient(const PairAttentionArguments& a,
                                                const KeyView& view, const Pair& pair,
                                                const Dropout<C>& dropout, int64_t i, int64_t j,
                                                const T* q, const T* k, const T* v,
                                                const T* grad_context) {
  if (i >= a.queries || key_hidden(a, view, pair, j)) return {C(0), C(0)};
  const C score =
      masked_score(a, view, pair, i, j, static_cast<C>(a.scale) * dot<T, C>(q, k, a.width));
  const int64_t row = pair.row(a, i);
  const C p = exp(score - static_cast<const C*>(a.lse)[row]);
  if (p == C(0)) return {C(0), C(0)};
  const C weight =
      a.weight ? static_cast<const C*>(a.weight)[pair.b * a.chosen.num_heads + pair.h] : C(1);
  const C keep = dropout(i, j);
  const C grad_p = keep == C(0) ? C(0) : keep * dot<T, C>(grad_context, v, a.value_width);
  return {weight * p * keep, weight * p * (grad_p - static_cast<const C*>(a.delta)[row])};
}

/// One warp per query: the gradients of q and of the attention mask.
template <typename T>
struct PlainBackwardQuery {
  using C = Accumulator<T>;
  static constexpr int kThreads = kRowsAtOnce * kWarp;
  PairAttentionArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto [pair, tile] = pair_tile(a.chosen, block_index(), tiles_of(a.queries, kRowsAtOnce));
    const int64_t i = tile * kRowsAtOnce + warp_index();
    if (pair.h < 0 || i >= a.queries) return;
    const auto view = key_view(a, pair);
    const Dropout<C> dropout(a, pair);
    const int64_t unit = pair.unit(a), kv = pair.kv_unit(a);
    C sum[kOwn] = {};
    for (int64_t first = 0; first < keys_end(a, view, i + 1); first += kWarp) {
      const int64_t j = first + lane_index();
      const C gradient =
          score_gradient<T, C>(a, view, pair, dropout, i, j, unit_row<T>(a.q, pair.b, unit, i),
                               unit_row<T>(a.k, pair.b, kv, j), unit_row<T>(a.v, pair.b, kv, j),
                               unit_row<T>(a.grad_context, pair.b, unit, i))
              .gradient;
      if (a.grad_mask && j < view.masked)
        static_cast<C*>(
            a.grad_mask)[((pair.b * a.chosen.num_heads + pair.h) * a.queries + i) * view.masked +
                         j] = gradient;
      for (int lane = 0; lane < kWarp; ++lane) {
        const C factor = shuffle(gradient, lane);
        if (factor != C(0))
          add_row(sum, factor, unit_row<T>(a.k, pair.b, kv, first + lane), a.width);
      }
    }
    store_row(sum, static_cast<C>(a.scale), written_row<T>(a.grad_q, pair.b, unit, i), a.width);
  }
};

/// One warp per key: the gradients of k and v.
template <typename T>
struct PlainBackwardKey {
  using C = Accumulator<T>;
  static constexpr int kThreads = kRowsAtOnce * kWarp;
  PairAttentionArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto [pair, tile] = pair_tile(a.chosen, block_index(), tiles_of(a.keys, kRowsAtOnce));
    const int64_t j = tile * kRowsAtOnce + warp_index();
    if (pair.h < 0 || j >= a.keys) return;
    const auto view = key_view(a, pair);
    const Dropout<C> dropout(a, pair);
    const int64_t unit = pair.unit(a), kv = pair.kv_unit(a);
    C key_sum[kOwn] = {}, value_sum[kOwn] = {};
    const int64_t rows = key_hidden(a, view, pair, j) ? 0 : a.queries;
    for (int64_t first = first_row(a, j) / kWarp * kWarp; first < rows; first += kWarp) {
      const int64_t i = first + lane_index();
      const auto own =
          score_gradient<T, C>(a, view, pair, dropout, i, j, unit_row<T>(a.q, pair.b, unit, i),
                               unit_row<T>(a.k, pair.b, kv, j), unit_row<T>(a.v, pair.b, kv, j),
                               unit_row<T>(a.grad_context, pair.b, unit, i));
      for (int lane = 0; lane < kWarp; ++lane) {
        const C kept = shuffle(own.kept, lane), gradient = shuffle(own.gradient, lane);
        if (gradient != C(0))
          add_row(key_sum, gradient, unit_row<T>(a.q, pair.b, unit, first + lane), a.width);
        if (kept != C(0))
          add_row(value_sum, kept, unit_row<T>(a.grad_context, pair.b, unit, first + lane),
                  a.value_width);
      }
    }
    store_row(key_sum, static_cast<C>(a.scale), written_row<T>(a.grad_k, pair.b, unit, j), a.width);
    store_row(value_sum, C(1), written_row<T>(a.grad_v, pair.b, unit, j), a.value_width);
  }
};

/// delta = grad_context . context of kDeltaRows rows per block; if wanted, grad_context becomes the
/// gradient of the context instead of weight * context.
template <typename T>
struct DeltaKernel {
  using C = Accumulator<T>;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  PairAttentionArguments a;
  C* delta;
  bool weigh;

  HEADWISE_DEVICE void operator()() const {
    const auto [pair, tile] = pair_tile(a.chosen, block_index(), tiles_of(a.queries, kDeltaRows));
    if (pair.h < 0) return;                                           // the whole block
    const int lanes = lanes_of(a.value_width), rows = kWarp / lanes;  // rows of a warp at once
    const int64_t column = lane_index() % lanes * kPiece, unit = pair.unit(a);
    const C weight =
        weigh ? static_cast<const C*>(a.weight)[pair.b * a.chosen.num_heads + pair.h] : C(1);
    for (int first = warp_index() * rows; first < kDeltaRows; first += kWarps * rows) {
      const int64_t i = tile * kDeltaRows + first + lane_index() / lanes;
      const bool inside = first + lane_index() / lanes < kDeltaRows && i < a.queries;
      C grad[kPiece], context[kPiece], sum = 0;
      read_piece<T, C>(grad, inside ? unit_row<T>(a.grad_context, pair.b, unit, i) : nullptr,
                       column, a.value_width, a.context_vectors);
      read_piece<T, C>(context, inside ? unit_row<T>(a.context, pair.b, unit, i) : nullptr, column,
                       a.value_width, a.context_vectors);
#pragma unroll
      for (int c = 0; c < kPiece; ++c) sum += grad[c] * context[c];
      for (int d = 1; d < lanes; d *= 2) sum += shuffle_xor(sum, d);
      if (inside && column == 0) delta[pair.row(a, i)] = sum;
      if (inside && weigh)
        write_piece<T, C>(grad, weight, written_row<T>(a.grad_context, pair.b, unit, i), column,
                          a.value_width, a.context_vectors);
    }
  }
};

/// One block per pair: the gradient of its weight, the sum of delta in a fixed order.
template <typename C>
struct WeightGradientKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int64_t kShared = kWarps * sizeof(C);
  PairAttentionArguments a;
  const C* delta;
  C* grad_weight;

  HEADWISE_DEVICE void operator()() const {
    const Pair pair = pair_tile(a.chosen, block_index(), 1).pair;
    if (pair.h < 0) return;  // the whole block
    C sum = 0;
    for (int64_t i = thread_index(); i < a.queries; i += kThreads) sum += delta[pair.row(a, i)];
    sum = warp_sum(sum);
    C* const totals = reinterpret_cast<C*>(shared_memory());
    if (lane_index() == 0) totals[warp_index()] = sum;
    barrier();
    if (thread_index()) return;
    C total = 0;
    for (int w = 0; w < kWarps; ++w) total += totals[w];
    grad_weight[pair.b * a.chosen.num_heads + pair.h] = total;
  }
};

}  // namespace headwise::kernels::cuda

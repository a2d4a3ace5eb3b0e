// The kernels behind budget_gate.h.
#pragma once

#include "kernels/cuda/budget_gate.h"
#include "kernels/cuda/decode_kernels.h"

namespace headwise::kernels::cuda {

/// Sums of the tokens of one split: warps take rows in turn, lanes eight columns each.
template <typename T>
struct PoolKernel {
  using C = Accumulator<T>;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp, kAtOnce = 4;
  static constexpr int64_t kShared = kWarps * (kPoolColumns + 1) * sizeof(C);
  GateArguments a;

  HEADWISE_DEVICE void operator()() const {
    const auto tile = pool_tile(a, block_index());
    const int64_t column = tile.column + lane_index() * kPiece;
    const int64_t begin = tile.split * kPoolRows;
    const int64_t end = begin + kPoolRows < a.rows ? begin + kPoolRows : a.rows;
    C sum[kPiece] = {}, tokens = 0;
    for (int64_t first = begin + warp_index(); first < end; first += kAtOnce * kWarps) {
      C weight[kAtOnce];
      Raw<T> raw[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int64_t l = first + n * kWarps, at = tile.b * a.rows + l;
        weight[n] = l < end ? C(1) : C(0);
        if (a.forbid && l < end) weight[n] = a.forbid[at] ? C(0) : C(1);
        if (a.add && l < end) weight[n] = exp(static_cast<const C*>(a.add)[at]);
        const bool read = l < end && !(a.forbid && weight[n] == C(0));  // padding is not read
        raw[n] = read_raw(read ? static_cast<const T*>(a.x.data) + a.x.offset(tile.b, l) : nullptr,
                          column, a.width, a.vectors);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        C piece[kPiece];
        convert(piece, raw[n]);
        tokens += weight[n];
#pragma unroll
        for (int c = 0; c < kPiece; ++c) sum[c] += weight[n] * piece[c];
      }
    }
    C* const sums = reinterpret_cast<C*>(shared_memory());
    C* const mine = sums + warp_index() * (kPoolColumns + 1);
#pragma unroll
    for (int c = 0; c < kPiece; ++c) mine[lane_index() * kPiece + c] = sum[c];
    if (lane_index() == 0) mine[kPoolColumns] = tokens;
    barrier();
    C* const row = static_cast<C*>(a.partial) + pool_row(a, tile.b, tile.split);
    for (int64_t c = thread_index(); c <= kPoolColumns; c += kThreads) {
      C total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums[w * (kPoolColumns + 1) + c];
      if (c < kPoolColumns) {
        if (tile.column + c < a.width) row[tile.column + c] = total;
      } else if (tile.column == 0) {
        row[a.width] = total;
      }
    }
  }
};

/// P: the type of the parameters.
template <typename P, typename C>
struct GateKernel {
  static constexpr int kWarps = 16, kThreads = kWarps * kWarp;
  static_assert((kWidestGate + kMostGateHeads + kWarps + 1) * sizeof(C) <= kSharedOfAny);
  GateArguments a;

  static int64_t shared(const GateArguments& a) {
    return (a.width + a.heads + kWarps + 1) * static_cast<int64_t>(sizeof(C));
  }

  /// features . row of a weight [., D], by a warp.
  HEADWISE_DEVICE C product(const C* features, const void* weight, int64_t row) const {
    const P* const values = static_cast<const P*>(weight) + row * a.width;
    C sum = 0;
    for (int64_t c = lane_index() * kPiece; c < a.width; c += kWarp * kPiece) {
      C piece[kPiece];
      read_piece<P, C>(piece, values, c, a.width, a.vectors);
#pragma unroll
      for (int n = 0; n < kPiece; ++n)
        if (c + n < a.width) sum += piece[n] * features[c + n];
    }
    return warp_sum(sum);
  }

  HEADWISE_DEVICE void operator()() const {
    const int64_t b = block_index(), D = a.width, H = a.heads;
    C* const features = reinterpret_cast<C*>(shared_memory());  // [D]
    C* const relevance = features + D;                          // [H]
    C* const logits = relevance + H;                            // [kWarps] and the budget
    const C* const partial = static_cast<const C*>(a.partial);
    C tokens = 0;
    for (int64_t s = 0; s < pool_splits(a); ++s) tokens += partial[pool_row(a, b, s) + D];
    const C inverse = inverse_tokens(tokens);
    for (int64_t c = thread_index(); c < D; c += kThreads) {
      C sum = 0;
      for (int64_t s = 0; s < pool_splits(a); ++s) sum += partial[pool_row(a, b, s) + c];
      features[c] = (sum * inverse - static_cast<const C*>(a.mean)[c]) *
                    inverse_spread(static_cast<const C*>(a.variance)[c]);
    }
    barrier();
    const C scale = C(1) / sqrt(static_cast<C>(D));
    for (int64_t h = warp_index(); h < H; h += kWarps) {
      const C own = product(features, a.relevance_weight, h) * scale +
                    static_cast<C>(static_cast<const P*>(a.base)[h]);
      if (lane_index() == 0) relevance[h] = own;
    }
    if (a.hidden_weight) {
      C logit = 0;
      for (int64_t n = warp_index(); n < a.hidden; n += kWarps) {
        const C x = product(features, a.hidden_weight, n) * scale +
                    static_cast<C>(static_cast<const P*>(a.hidden_bias)[n]);
        logit += gelu(x) * static_cast<C>(static_cast<const P*>(a.out_weight)[n]);
      }
      if (lane_index() == 0) logits[warp_index()] = logit;
    }
    barrier();
    if (thread_index() == 0) {
      C budget = static_cast<C>(a.fixed_budget);
      if (a.hidden_weight) {
        C logit = static_cast<C>(static_cast<const P*>(a.out_bias)[0]);
        for (int w = 0; w < kWarps; ++w) logit += logits[w];
        const C progress = a.progress ? *static_cast<const C*>(a.progress) : C(1);
        budget =
            budget_of_logit(logit, progress, a.warmup, a.start_logit, a.min_budget, a.max_budget);
      }
      logits[kWarps] = budget;
      static_cast<C*>(a.budget)[b] = budget;
    }
    barrier();
    const C budget = logits[kWarps];
    const int64_t k = heads_of_budget(budget, H, a.min_heads, a.round_up);
    if (thread_index() == 0) a.count[b] = static_cast<int32_t>(k);
    if (warp_index()) return;
    const auto load = [&](int64_t h) { return relevance[h]; };
    int64_t written = 0;
    for (int64_t first = 0; first < H; first += kWarp) {
      const int64_t h = first + lane_index();
      const bool chosen = h < H && selection_rank(load, h, H) < k;
      const uint32_t bits = ballot(chosen);
      const int64_t place = written + count_bits(bits & ((1u << lane_index()) - 1));
      written += count_bits(bits);
      if (chosen) a.index[b * H + place] = static_cast<int32_t>(h);
      if (h < H) {
        static_cast<C*>(a.relevance)[b * H + h] = relevance[h];
        store_weight(b * H + h, chosen);
      }
    }
    for (int64_t i = written + lane_index(); i < H; i += kWarp) a.index[b * H + i] = -1;
  }

  HEADWISE_DEVICE void store_weight(int64_t at, bool chosen) const {
    const float value = chosen ? 1.f : 0.f;
    switch (a.input_type) {
      case Element::f64:
        static_cast<double*>(a.weight)[at] = value;
        break;
      case Element::f32:
        static_cast<float*>(a.weight)[at] = value;
        break;
      case Element::f16:
        static_cast<Half*>(a.weight)[at] = static_cast<Half>(value);
        break;
      case Element::bf16:
        static_cast<BFloat16*>(a.weight)[at] = static_cast<BFloat16>(value);
        break;
    }
  }
};

}  // namespace headwise::kernels::cuda

#include "kernels/cpu/budget_gate.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/budget_gate.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"
#include "kernels/selection.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kPooledRows = 256;  // tokens of a sequence that a task adds up
constexpr int64_t kTogether = 8;      // sequences that share a reading of the parameters
constexpr int kAdded = 8;             // rows added at a time

// Clones are of functions, so each type has its own; the template is inlined into them.

template <int N, typename T>
HEADWISE_INLINE void add_weighted(const T* const* x, const float* w, int64_t n, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Float16 sum, v;
    load(sums + c, sum);
    for (int i = 0; i < N; ++i) {
      load(x[i] + c, v);
      sum += v * w[i];
    }
    store(sums + c, sum);
  }
  for (; c < n; ++c)
    for (int i = 0; i < N; ++i) sums[c] += value(x[i] + c) * w[i];
}

/// sums [n] += w[i] x[i] [n] over `rows` <= kAdded rows.
#define HEADWISE_ADD_ROWS(T)                                                               \
  HEADWISE_CLONES                                                                          \
  void add_rows(const T* const* x, const float* w, int64_t rows, int64_t n, float* sums) { \
    if (rows == kAdded) return add_weighted<kAdded>(x, w, n, sums);                        \
    for (int64_t i = 0; i < rows; ++i) add_weighted<1>(x + i, w + i, n, sums);             \
  }
HEADWISE_ADD_ROWS(float)
HEADWISE_ADD_ROWS(BFloat16)
HEADWISE_ADD_ROWS(Half)
#undef HEADWISE_ADD_ROWS
void add_rows(const double* const* x, const double* w, int64_t rows, int64_t n, double* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < n; ++c) sums[c] += x[i][c] * w[i];
}

/// R rows of weights by S rows of features. Each product is summed in the same order, whatever its
/// neighbours.
template <int R, int S, typename P>
HEADWISE_INLINE void dots(const P* w, int64_t n, const float* x, float* y, int64_t ldy) {
  Float16 sum[R][S] = {}, v;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Float16 right[S];
    for (int s = 0; s < S; ++s) load(x + s * n + c, right[s]);
    for (int r = 0; r < R; ++r) {
      load(w + r * n + c, v);
      for (int s = 0; s < S; ++s) sum[r][s] += v * right[s];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) {
      float total = lane_sum(sum[r][s]);
      for (int64_t i = c; i < n; ++i) total += value(w + r * n + i) * x[s * n + i];
      y[s * ldy + r] = total;
    }
}
template <int R, typename P>
HEADWISE_INLINE void dots_of(int64_t count, const P* w, int64_t n, const float* x, float* y,
                             int64_t ldy) {
  int64_t s = 0;
  for (; s + 2 <= count; s += 2) dots<R, 2>(w, n, x + s * n, y + s * ldy, ldy);
  if (s < count) dots<R, 1>(w, n, x + s * n, y + s * ldy, ldy);
}

/// y [count, rows] (rows ldy apart) = x [count, n] w [rows, n]'.
#define HEADWISE_PRODUCTS(P)                                                                  \
  HEADWISE_CLONES                                                                             \
  void products(const P* w, int64_t rows, int64_t n, const float* x, int64_t count, float* y, \
                int64_t ldy) {                                                                \
    int64_t r = 0;                                                                            \
    for (; r + 4 <= rows; r += 4) dots_of<4>(count, w + r * n, n, x, y + r, ldy);             \
    for (; r < rows; ++r) dots_of<1>(count, w + r * n, n, x, y + r, ldy);                     \
  }
HEADWISE_PRODUCTS(float)
HEADWISE_PRODUCTS(BFloat16)
HEADWISE_PRODUCTS(Half)
#undef HEADWISE_PRODUCTS
void products(const double* w, int64_t rows, int64_t n, const double* x, int64_t count, double* y,
              int64_t ldy) {
  for (int64_t s = 0; s < count; ++s)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < n; ++c) sum += w[r * n + c] * x[s * n + c];
      y[s * ldy + r] = sum;
    }
}

template <typename T, typename P>
class Evaluation {
  using C = typename BudgetGate<T, P>::C;

 public:
  explicit Evaluation(const BudgetGate<T, P>& gate)
      : g_(gate),
        D_(gate.width),
        H_(gate.heads),
        workers_(at::get_num_threads()),
        splits_(std::max<int64_t>(1, blocks(gate.rows, kPooledRows))),
        spread_(D_) {
    for (int64_t c = 0; c < D_; ++c) spread_[c] = inverse_spread(g_.variance[c]);
  }

  void run() const {
    // Long sequences are added up by several tasks.
    Scratch<C> partial(splits_ > 1 ? D_ + 1 : 0, g_.batch * splits_);
    if (splits_ > 1)
      parallel_tasks(g_.batch * splits_, [&](int64_t task, int64_t) {
        pool(task / splits_, task % splits_, partial[task]);
      });
    const int64_t together = std::clamp<int64_t>(blocks(g_.batch, workers_), int64_t{1}, kTogether);
    const int64_t most = std::max(H_, g_.hidden);
    Scratch<C> features(together * (D_ + 1), workers_), answers(together * most, workers_);
    parallel_tasks(blocks(g_.batch, together), [&](int64_t task, int64_t worker) {
      const int64_t begin = task * together, n = std::min(together, g_.batch - begin);
      C* const z = features[worker];  // [n, D] and a place more: pool() writes D + 1
      for (int64_t s = 0; s < n; ++s) {
        C* const row = z + s * D_;
        if (splits_ == 1)
          pool(begin + s, 0, row);
        else
          gather(partial, begin + s, row);
        standardize(row);
      }
      decide(begin, n, z, answers[worker], most);
    });
  }

 private:
  /// The sums [D] over the tokens of one split, then how many they are.
  void pool(int64_t b, int64_t split, C* sums) const {
    std::fill_n(sums, D_ + 1, C(0));
    const int64_t begin = split * kPooledRows, end = std::min(g_.rows, begin + kPooledRows);
    const T* rows[kAdded];
    C weights[kAdded], tokens = 0;
    int64_t n = 0;
    for (int64_t l = begin; l < end; ++l) {
      const int64_t at = b * g_.mask_batch + l * g_.mask_row;
      C weight = 1;
      if (g_.padding) weight = g_.padding[at] ? C(0) : C(1);
      if (g_.added) weight = std::exp(g_.added[at]);
      if (weight == C(0)) continue;  // padding is not read
      tokens += weight;
      rows[n] = g_.x + b * g_.x_batch + l * g_.x_row;
      weights[n] = weight;
      if (++n < kAdded) continue;
      add_rows(rows, weights, n, D_, sums);
      n = 0;
    }
    add_rows(rows, weights, n, D_, sums);
    sums[D_] = tokens;
  }

  void gather(const Scratch<C>& partial, int64_t b, C* sums) const {
    std::fill_n(sums, D_ + 1, C(0));
    for (int64_t split = 0; split < splits_; ++split) {
      const C* const part = partial[b * splits_ + split];
      for (int64_t c = 0; c <= D_; ++c) sums[c] += part[c];
    }
  }

  void standardize(C* row) const {
    const C inverse = inverse_tokens(row[D_]);
    for (int64_t c = 0; c < D_; ++c) row[c] = (row[c] * inverse - g_.mean[c]) * spread_[c];
  }

  /// Relevance, budgets and choices of n sequences from b on, with features z [n, D].
  void decide(int64_t b, int64_t n, const C* z, C* answers, int64_t ld) const {
    const C scale = C(1) / std::sqrt(static_cast<C>(D_));
    C* const relevance = g_.relevance + b * H_;
    products(g_.relevance_weight, H_, D_, z, n, relevance, H_);
    for (int64_t s = 0; s < n; ++s)
      for (int64_t h = 0; h < H_; ++h)
        relevance[s * H_ + h] = relevance[s * H_ + h] * scale + static_cast<C>(g_.base[h]);
    if (g_.hidden_weight) products(g_.hidden_weight, g_.hidden, D_, z, n, answers, ld);
    for (int64_t s = 0; s < n; ++s) {
      g_.budget[b + s] =
          g_.hidden_weight ? budget(answers + s * ld, scale) : static_cast<C>(g_.fixed_budget);
      choose(b + s);
    }
  }

  C budget(const C* answers, C scale) const {
    C logit = static_cast<C>(g_.out_bias[0]);
    for (int64_t i = 0; i < g_.hidden; ++i)
      logit += gelu(answers[i] * scale + static_cast<C>(g_.hidden_bias[i])) *
               static_cast<C>(g_.out_weight[i]);
    return budget_of_logit(logit, static_cast<C>(g_.progress), g_.warmup, g_.start_logit,
                           g_.min_budget, g_.max_budget);
  }

  void choose(int64_t b) const {
    const C* const relevance = g_.relevance + b * H_;
    const int64_t k = heads_of_budget(g_.budget[b], H_, g_.min_heads, g_.round_up);
    const auto load = [relevance](int64_t h) { return relevance[h]; };
    int32_t* const index = g_.index + b * H_;
    T* const weight = g_.weight + b * H_;
    int64_t written = 0;
    for (int64_t h = 0; h < H_; ++h) {
      const bool chosen = k == H_ || selection_rank(load, h, H_) < k;
      weight[h] = static_cast<T>(chosen ? 1.f : 0.f);
      if (chosen) index[written++] = static_cast<int32_t>(h);
    }
    std::fill(index + written, index + H_, -1);
    g_.count[b] = static_cast<int32_t>(k);
  }

  const BudgetGate<T, P>& g_;
  const int64_t D_, H_, workers_, splits_;
  std::vector<C> spread_;  // [D]
};

}  // namespace

template <typename T, typename P>
void budget_gate(const BudgetGate<T, P>& gate) {
  Evaluation<T, P>(gate).run();
}

#define HEADWISE_INSTANTIATE(T, P) template void budget_gate(const BudgetGate<T, P>&);
#define HEADWISE_INSTANTIATE_INPUT(T) \
  HEADWISE_INSTANTIATE(T, float)      \
  HEADWISE_INSTANTIATE(T, BFloat16)   \
  HEADWISE_INSTANTIATE(T, Half)
HEADWISE_INSTANTIATE(double, double)
HEADWISE_INSTANTIATE_INPUT(float)
HEADWISE_INSTANTIATE_INPUT(BFloat16)
HEADWISE_INSTANTIATE_INPUT(Half)
#undef HEADWISE_INSTANTIATE_INPUT
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

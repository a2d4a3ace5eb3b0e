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
#include "kernels/cpu/pooled_input.h"
#include "kernels/cpu/simd.h"
#include "kernels/selection.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kTogether = 8;  // sequences that share a reading of the parameters

// Clones are of functions, so each type has its own; the template is inlined into them.

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
        splits_(pooled_splits(gate.rows)),
        spread_(D_) {
    inverse_spreads(g_.variance, D_, spread_.data());
  }

  void run() const {
    // Long sequences are added up by several tasks.
    Scratch<C> partial(splits_ > 1 ? D_ + 1 : 0, g_.batch * splits_);
    if (splits_ > 1)
      parallel_tasks(g_.batch * splits_, [&](int64_t task, int64_t) {
        pool(g_, task / splits_, task % splits_, partial[task]);
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
          pool(g_, begin + s, 0, row);
        else
          gather(partial, begin + s, splits_, D_, row);
        standardize(row);
      }
      decide(begin, n, z, answers[worker], most);
    });
  }

 private:
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

#include "kernels/cpu/gate_choice.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/budget_gate.h"
#include "kernels/gate_choice.h"
#include "kernels/selection.h"

namespace headwise::kernels {
namespace {

constexpr double kLeast = 1e-6;  // uniform numbers are at least this far from 0 and 1

/// Writes index and count of sequence b: the heads for which chosen(h), or all of them.
template <typename C, typename Chosen>
void write_heads(const GateChoice<C>& g, int64_t b, bool all, const Chosen& chosen) {
  int32_t* const index = g.index + b * g.heads;
  int64_t n = 0;
  for (int64_t h = 0; h < g.heads; ++h)
    if (all || chosen(h)) index[n++] = static_cast<int32_t>(h);
  std::fill(index + n, index + g.heads, -1);
  g.count[b] = static_cast<int32_t>(n);
}

}  // namespace

template <typename C>
void choose_budget(const BudgetChoice<C>& g) {
  const int64_t H = g.heads;
  const bool soft = g.training || g.soft_weight;
  std::vector<C> row(H), soft_weight(H), slope(H);
  std::vector<char> chosen(H);
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      row[h] = g.scores[b * H + h];
      if (g.noise) row[h] += g.noise[b * H + h] * static_cast<C>(g.noise_scale);
    }
    const auto load = [&](int64_t h) { return row[h]; };
    const int64_t k = heads_of_budget(g.budget[b], H, g.min_heads, g.round_up);
    C least = -std::numeric_limits<C>::infinity(), most = -least;  // left out, chosen
    for (int64_t h = 0; h < H; ++h) {
      chosen[h] = k == H || selection_rank(load, h, H) < k;
      if (chosen[h])
        most = std::min(most, row[h]);
      else
        least = std::max(least, row[h]);
    }
    const C mass = g.budget[b] * static_cast<C>(H);
    C* const weight = g.weight + b * H;
    C share = 0;
    if (soft) {
      const C start = !std::isfinite(least)  ? most
                      : !std::isfinite(most) ? least
                                             : (least + most) / 2;
      share = soft_top_k(row.data(), H, mass, static_cast<C>(g.tau), start, soft_weight.data(),
                         slope.data());
    }
    for (int64_t h = 0; h < H; ++h) {
      const C hard = chosen[h] ? (g.soft_weight ? soft_weight[h] : C(1)) : C(0);
      weight[h] = g.training && !g.straight_through && !g.hard ? soft_weight[h] : hard;
    }
    g.expected[b] = g.hard ? static_cast<C>(k) : mass;
    if (g.slope && soft) {
      // Evaluation weighs only the chosen heads, but all of them share the mass.
      std::copy(slope.begin(), slope.end(), g.slope + b * H);
      g.share[b] = share;
    }
    const bool all = g.training && (g.run_all || !(g.straight_through || g.hard));
    write_heads(g, b, all, [&](int64_t h) { return bool(chosen[h]); });
  }
}

template <typename C>
void choose_hard_concrete(const HardConcreteChoice<C>& g) {
  const int64_t H = g.heads;
  const C beta = static_cast<C>(g.beta), gamma = static_cast<C>(g.gamma),
          zeta = static_cast<C>(g.zeta);
  const C shift = static_cast<C>(g.beta * std::log(-g.gamma / g.zeta));
  const bool samples = g.training && g.uniform && !g.hard && !g.weight_one;
  for (int64_t b = 0; b < g.batch; ++b) {
    const C* const scores = g.scores + b * H;
    C* const weight = g.weight + b * H;
    C expected = 0;
    int64_t hard_open = 0;
    for (int64_t h = 0; h < H; ++h) {
      const C open = sigmoid(scores[h] - shift);
      const C open_slope = open * (C(1) - open);
      expected += open;
      Weight<C> w;
      if (g.weight_one)
        w = {open > C(0.5) ? C(1) : C(0), g.training ? open_slope : C(0)};
      else
        w = hard_concrete(scores[h], C(1), gamma, zeta);
      hard_open += w.value != C(0);
      if (samples) {
        const C u = g.uniform[b * g.uniform_batch + h] * static_cast<C>(1.0 - 2.0 * kLeast) +
                    static_cast<C>(kLeast);
        w = hard_concrete((logistic(u) + scores[h]) / beta, C(1) / beta, gamma, zeta);
      }
      weight[h] = w.value;
      if (g.slope) {
        g.slope[b * H + h] = w.slope;
        g.expected_slope[b * H + h] = open_slope;
      }
    }
    g.expected[b] = g.training && (g.weight_one || g.hard) ? static_cast<C>(hard_open) : expected;
    write_heads(g, b, g.training && g.run_all, [&](int64_t h) { return weight[h] != C(0); });
  }
}

template <typename C>
void choose_gumbel_sigmoid(const GumbelSigmoidChoice<C>& g) {
  const int64_t H = g.heads;
  const C temperature = static_cast<C>(g.temperature);
  const bool samples = g.training && g.uniform && !g.hard;
  for (int64_t b = 0; b < g.batch; ++b) {
    C* const weight = g.weight + b * H;
    int64_t open = 0;
    for (int64_t h = 0; h < H; ++h) {
      C raised = g.scores[b * H + h];
      if (samples)
        raised += logistic(
            std::clamp(g.uniform[b * H + h], static_cast<C>(kLeast), static_cast<C>(1.0 - kLeast)));
      weight[h] = raised > C(0) ? C(1) : C(0);
      open += raised > C(0);
      if (g.slope) {
        const C soft = sigmoid(raised / temperature);
        g.slope[b * H + h] = soft * (C(1) - soft) / temperature;
      }
    }
    g.expected[b] = static_cast<C>(open);
    write_heads(g, b, g.training && g.run_all, [&](int64_t h) { return weight[h] != C(0); });
  }
}

template <typename C>
void choice_backward(const GateChoiceBackward<C>& g) {
  const int64_t H = g.heads;
  for (int64_t b = 0; b < g.batch; ++b) {
    const C* const grad = g.grad_weight && g.slope ? g.grad_weight + b * H : nullptr;
    const C grad_expected = g.grad_expected ? g.grad_expected[b] : C(0);
    C shared = 0;  // the gradient of the mass
    if (grad && g.share) {
      for (int64_t h = 0; h < H; ++h) shared += grad[h] * g.slope[b * H + h];
      shared *= g.share[b];
    }
    for (int64_t h = 0; h < H; ++h) {
      C sum = grad ? (grad[h] - shared) * g.slope[b * H + h] : C(0);
      if (g.expected_slope) sum += grad_expected * g.expected_slope[b * H + h];
      g.grad_scores[b * H + h] = sum;
    }
    if (g.grad_budget) g.grad_budget[b] = (shared + grad_expected) * static_cast<C>(H);
  }
}

#define HEADWISE_INSTANTIATE(C)                                       \
  template void choose_budget(const BudgetChoice<C>&);                \
  template void choose_hard_concrete(const HardConcreteChoice<C>&);   \
  template void choose_gumbel_sigmoid(const GumbelSigmoidChoice<C>&); \
  template void choice_backward(const GateChoiceBackward<C>&);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(double)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

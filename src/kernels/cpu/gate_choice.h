// The heads that a gate chooses for each sequence of a batch, and the slopes of their weights,
// which a backward reads. The formulas are those of kernels/gate_choice.h. C: float or double.
#pragma once

#include <cstdint>

namespace headwise::kernels {

/// Scores of the heads, and what becomes of them.
template <typename C>
struct GateChoice {
  int64_t batch, heads;
  const C* scores;         ///< [B, H], finite
  bool training, run_all;  ///< run_all: every head runs in training
  bool hard;               ///< training, and progress has reached hard_from
  int32_t *index, *count;  ///< [B, H], [B]
  C *weight, *expected;    ///< [B, H], [B]
  C* slope;                ///< [B, H], d weight / d score; null: not wanted
};

/// A BudgetGate's: scores [B, H] are the relevance.
template <typename C>
struct BudgetChoice : GateChoice<C> {
  const C* budget;  ///< [B], in (0, 1]
  const C* noise;   ///< [B, H]; or null
  double noise_scale, tau;
  bool straight_through, soft_weight;
  int64_t min_heads;
  bool round_up;
  C* share;  ///< [B], see soft_top_k(); with `slope`
};
template <typename C>
void choose_budget(const BudgetChoice<C>& choice);

/// A HardConcreteGate's: scores are log_alpha.
template <typename C>
struct HardConcreteChoice : GateChoice<C> {
  const C* uniform;       ///< [H], or [B, H]; or null: no samples
  int64_t uniform_batch;  ///< from one sequence to the next
  double beta, gamma, zeta;
  bool weight_one;
  C* expected_slope;  ///< [B, H], d expected / d score; with `slope`
};
template <typename C>
void choose_hard_concrete(const HardConcreteChoice<C>& choice);

/// A GumbelSigmoidGate's: scores are logits; `slope` is that of `expected` too.
template <typename C>
struct GumbelSigmoidChoice : GateChoice<C> {
  const C* uniform;  ///< [B, H]; or null
  double temperature;
};
template <typename C>
void choose_gumbel_sigmoid(const GumbelSigmoidChoice<C>& choice);

/// The gradients of scores [B, H] and budget [B] from those of weight [B, H] and expected [B], each
/// of which may be null.
template <typename C>
struct GateChoiceBackward {
  int64_t batch, heads;
  const C *grad_weight, *grad_expected;
  const C* slope;           ///< [B, H]; null: no gradient
  const C* expected_slope;  ///< [B, H]; null: `expected` is H times the budget
  const C* share;           ///< [B]; null: no budget
  C *grad_scores, *grad_budget;
};
template <typename C>
void choice_backward(const GateChoiceBackward<C>& b);

}  // namespace headwise::kernels

// Options of gates, and their form in files. The same names, values and defaults as the arguments
// of headwise.*Gate in Python, whose documentation says what each does.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/export.h"

namespace headwise {

/// Options of FixedGate.
/// Example: FixedGateOptions().heads({0, 3})
struct HEADWISE_API FixedGateOptions {
  /// The heads that run, with weight one; default: all.
  TORCH_ARG(std::optional<std::vector<int64_t>>, heads) = std::nullopt;
  /// Instead of heads: a weight a head; 0 = does not run.
  TORCH_ARG(std::optional<std::vector<double>>, scale) = std::nullopt;
  /// In training run "all" heads or the "selected".
  TORCH_ARG(std::string, execution) = "selected";
};

/// Options of RandomGate.
/// Example: RandomGateOptions().keep(0.25)
struct HEADWISE_API RandomGateOptions {
  /// Share of the heads that run, in (0, 1].
  TORCH_ARG(double, keep) = 0.5;
  /// Draw anew for every sequence, or once when the gate is built.
  TORCH_ARG(bool, per_input) = true;
  TORCH_ARG(std::string, execution) = "selected";
};

/// Options of BudgetGate (BudgetFormer, arXiv 2604.22583).
/// Example: BudgetGateOptions().target(0.5)
struct HEADWISE_API BudgetGateOptions {
  /// Mean share of heads to run, in (0, 1]; 1 is the dense layer.
  TORCH_ARG(double, target) = 0.5;
  /// Fixes every input's budget instead of predicting it.
  TORCH_ARG(std::optional<double>, budget) = std::nullopt;
  TORCH_ARG(double, min_budget) = 0.1;
  TORCH_ARG(double, max_budget) = 1.0;
  /// The budget at the start of training.
  TORCH_ARG(double, initial_budget) = 0.95;
  /// Width of the budget's network; default max(8, embed_dim / 8).
  TORCH_ARG(std::optional<int64_t>, hidden_dim) = std::nullopt;
  TORCH_ARG(int64_t, min_heads) = 1;
  /// "round" (half up) or "ceil".
  TORCH_ARG(std::string, rounding) = "round";
  /// "model": one target on the mean over layers; "layer": one each.
  TORCH_ARG(std::string, target_scope) = "model";
  TORCH_ARG(double, strength) = 20.0;
  TORCH_ARG(double, bounds_strength) = 1.0;
  TORCH_ARG(double, entropy_strength) = 0.0;
  TORCH_ARG(double, temperature) = 0.5;
  TORCH_ARG(double, final_temperature) = 0.1;
  /// "gumbel" or "normal".
  TORCH_ARG(std::string, noise) = "gumbel";
  TORCH_ARG(double, noise_scale) = 0.5;
  TORCH_ARG(double, warmup) = 0.3;
  TORCH_ARG(double, static_until) = 0.4;
  TORCH_ARG(double, hard_from) = 0.75;
  /// "exact_mass" or "straight_through".
  TORCH_ARG(std::string, relaxation) = "exact_mass";
  /// "one" or "soft".
  TORCH_ARG(std::string, kept_weight) = "one";
  TORCH_ARG(std::string, execution) = "all";
};

/// Options of HardConcreteGate (arXiv 1905.09418).
/// Example: HardConcreteGateOptions().target(0.5).input_dependent(true)
struct HEADWISE_API HardConcreteGateOptions {
  TORCH_ARG(double, target) = 0.5;
  TORCH_ARG(bool, input_dependent) = false;
  /// "squared", "lagrangian" or "l0".
  TORCH_ARG(std::string, penalty) = "squared";
  TORCH_ARG(double, strength) = 20.0;
  TORCH_ARG(std::string, target_scope) = "model";
  /// "gate" (its value) or "one" (hard, with a straight-through gradient, from the first step).
  TORCH_ARG(std::string, kept_weight) = "gate";
  TORCH_ARG(double, init_log_alpha) = 3.0;
  TORCH_ARG(double, beta) = 0.33;
  TORCH_ARG(double, gamma) = -0.1;
  TORCH_ARG(double, zeta) = 1.1;
  TORCH_ARG(double, warmup) = 0.3;
  TORCH_ARG(double, initial_target) = 0.95;
  TORCH_ARG(double, static_until) = 0.4;
  TORCH_ARG(double, hard_from) = 0.75;
  TORCH_ARG(std::string, execution) = "all";
};

/// Options of SubsetGate (Li, Cotterell and Sachan 2021, arXiv 2108.04657).
/// Example: SubsetGateOptions().k(18)
struct HEADWISE_API SubsetGateOptions {
  /// Heads that run: of the whole model, or of each layer with scope "layer".
  TORCH_ARG(std::optional<int64_t>, k) = std::nullopt;
  /// Where k is not given: the share of the heads, rounded, at least one head.
  TORCH_ARG(double, keep) = 0.5;
  /// "model": one choice among the heads of all layers (see link_gates); "layer": one each.
  TORCH_ARG(std::string, scope) = "model";
  /// "gumbel" or "straight_through".
  TORCH_ARG(std::string, estimator) = "gumbel";
  TORCH_ARG(double, temperature) = 1000.0;
  TORCH_ARG(double, final_temperature) = 0.1;
  TORCH_ARG(double, cooled_at) = 0.68;
  TORCH_ARG(double, hard_from) = 0.75;
  TORCH_ARG(std::string, execution) = "all";
};

/// Options of RequestedBudgetGate (arXiv 2605.02697).
/// Example: RequestedBudgetGateOptions().budget(0.25)
struct HEADWISE_API RequestedBudgetGateOptions {
  /// Share of the heads that runs until another is requested, in (0, 1].
  TORCH_ARG(double, budget) = 0.5;
  /// Budgets that training draws from.
  TORCH_ARG(double, min_budget) = 0.1;
  TORCH_ARG(double, max_budget) = 1.0;
  /// "model": the budget is shared out among the layers (see link_gates); "layer": each has its
  /// own.
  TORCH_ARG(std::string, scope) = "model";
  /// No layer runs fewer heads.
  TORCH_ARG(int64_t, min_heads) = 0;
  TORCH_ARG(double, temperature) = 0.5;
  TORCH_ARG(double, final_temperature) = 0.1;
  TORCH_ARG(double, noise_scale) = 0.5;
  TORCH_ARG(double, static_until) = 0.4;
  TORCH_ARG(double, hard_from) = 0.75;
  TORCH_ARG(std::string, execution) = "all";
};

/// Options of GumbelSigmoidGate (AdaViT, arXiv 2111.15668).
/// Example: GumbelSigmoidGateOptions().target(0.5)
struct HEADWISE_API GumbelSigmoidGateOptions {
  TORCH_ARG(double, target) = 0.5;
  TORCH_ARG(double, strength) = 20.0;
  TORCH_ARG(std::string, target_scope) = "model";
  /// Of the sigmoid in training.
  TORCH_ARG(double, temperature) = 5.0;
  TORCH_ARG(double, init_logit) = 3.0;
  TORCH_ARG(double, warmup) = 0.3;
  TORCH_ARG(double, initial_target) = 0.95;
  TORCH_ARG(double, static_until) = 0.4;
  TORCH_ARG(double, hard_from) = 0.75;
  TORCH_ARG(std::string, execution) = "all";
};

/// Options of SleepGate.
/// Example: SleepGateOptions().keep(0.5).every(20)
struct HEADWISE_API SleepGateOptions {
  /// Share of the heads that is awake in the end, in (0, 1].
  TORCH_ARG(double, keep) = 0.5;
  /// "model": heads of all layers compete (see link_gates); "layer": those of each layer.
  TORCH_ARG(std::string, scope) = "model";
  /// Training steps from one decision to the next.
  TORCH_ARG(int64_t, every) = 10;
  /// How much better a sleeping head must score than one that is awake to take its place.
  TORCH_ARG(double, margin) = 0.2;
  /// Of the running average of scores.
  TORCH_ARG(double, decay) = 0.9;
  /// Progress at which all that are to sleep do.
  TORCH_ARG(double, asleep_by) = 0.3;
  /// Progress from which no head moves.
  TORCH_ARG(double, settled_from) = 0.75;
  /// With execution "selected": steps from one scoring of the sleeping heads to the next.
  TORCH_ARG(int64_t, probe_every) = 4;
  TORCH_ARG(std::string, execution) = "all";
};

/// Options of ThresholdGate (hybrid dynamic pruning, Jaradat et al. 2024, arXiv 2407.12893).
/// Example: ThresholdGateOptions().threshold(0.4)
struct HEADWISE_API ThresholdGateOptions {
  /// A head whose importance is not above it does not run.
  TORCH_ARG(double, threshold) = 0.0;
  /// Divide the importance by the number of scores it sums up.
  TORCH_ARG(bool, normalize) = true;
  /// No input runs fewer heads.
  TORCH_ARG(int64_t, min_heads) = 1;
  /// Queries and keys are multiplied by it before their integer parts are taken.
  TORCH_ARG(double, resolution) = 1.0;
  /// Rows and columns of a block of scores.
  TORCH_ARG(int64_t, block) = 2;
  /// In (-1, 1): prune blocks of scores by the row's threshold.
  TORCH_ARG(std::optional<double>, block_ratio) = std::nullopt;
  /// Leave out the product of the fractions.
  TORCH_ARG(bool, approximate) = false;
  TORCH_ARG(std::string, execution) = "selected";
};

struct GateOptionsBox;

/// Options of SharedHeadsGate (after MoH, arXiv 2410.11842).
/// Example: SharedHeadsGateOptions().gate(BudgetGateOptions()).shared({0, 1})
struct HEADWISE_API SharedHeadsGateOptions {
  /// Heads that run for every input.
  TORCH_ARG(std::vector<int64_t>, shared) = std::vector<int64_t>(1, 0);

 public:
  /// What chooses among the others.
  template <typename Options>
  SharedHeadsGateOptions& gate(Options options);
  const std::shared_ptr<const GateOptionsBox>& gate() const { return gate_; }

 private:
  std::shared_ptr<const GateOptionsBox> gate_;
};

/// Any gate's options: what MultiheadAttentionOptions::gate takes.
using GateOptions =
    std::variant<FixedGateOptions, RandomGateOptions, BudgetGateOptions, HardConcreteGateOptions,
                 SubsetGateOptions, RequestedBudgetGateOptions, GumbelSigmoidGateOptions,
                 SleepGateOptions, ThresholdGateOptions, SharedHeadsGateOptions>;

/// A gate's options inside another's.
struct GateOptionsBox {
  GateOptions options;
};

template <typename Options>
SharedHeadsGateOptions& SharedHeadsGateOptions::gate(Options options) {
  gate_ = std::make_shared<const GateOptionsBox>(GateOptionsBox{std::move(options)});
  return *this;
}

/// {"type": "BudgetGate", "target": 0.5, ...}, as Python's Gate.config() gives it.
HEADWISE_API std::string gate_options_to_json(const GateOptions& options);

/// @throws c10::ValueError for malformed JSON, an unknown type or key (by name), a value of the
///         wrong kind.
HEADWISE_API GateOptions gate_options_from_json(std::string_view json);

}  // namespace headwise

// Gates: modules that turn a layer's input into a selection of heads. The same names, options,
// defaults, parameters and numbers as headwise.*Gate in Python, whose documentation has the
// formulas and their sources.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "headwise/export.h"
#include "headwise/selection.h"

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

/// Any gate's options: what MultiheadAttentionOptions::gate takes.
using GateOptions =
    std::variant<FixedGateOptions, RandomGateOptions, BudgetGateOptions, HardConcreteGateOptions>;

/// {"type": "BudgetGate", "target": 0.5, ...}, as Python's Gate.config() gives it.
HEADWISE_API std::string gate_options_to_json(const GateOptions& options);

/// @throws c10::ValueError for malformed JSON, an unknown type or key (by name), a value of the
/// wrong
///         kind.
HEADWISE_API GateOptions gate_options_from_json(std::string_view json);

/// What every gate has in common.
class HEADWISE_API GateImpl : public torch::nn::Module {
 public:
  /// @param x                [B, L, D]
  /// @param key_padding_mask bool (true = padding) or floating [B, L], or undefined
  virtual Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) = 0;

  /// This gate's regulariser for the last training forward [].
  virtual at::Tensor penalty() const;

  /// Sets how far training has come, from 0 to 1.
  virtual void anneal(double progress);

  /// Puts the gate back to its initial state.
  virtual void reset_parameters() {}

  int64_t embed_dim() const { return embed_dim_; }
  int64_t num_heads() const { return num_heads_; }

  /// Differentiable [B]: heads the last training forward expected to run; undefined before one.
  at::Tensor expected_heads;

 protected:
  GateImpl(std::string name, int64_t embed_dim, int64_t num_heads, const std::string& execution);
  void check_input(const at::Tensor& x) const;
  bool run_all() const { return run_all_; }

 private:
  int64_t embed_dim_, num_heads_;
  bool run_all_;
};

/// The same heads for every input. Buffer: scale [H].
class HEADWISE_API FixedGateImpl : public GateImpl {
 public:
  FixedGateImpl(FixedGateOptions options, int64_t embed_dim, int64_t num_heads,
                const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;

  FixedGateOptions options;
  at::Tensor scale;
};
TORCH_MODULE(FixedGate);

/// Heads at random. Buffer: relevance [H].
class HEADWISE_API RandomGateImpl : public GateImpl {
 public:
  RandomGateImpl(RandomGateOptions options, int64_t embed_dim, int64_t num_heads,
                 const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;

  RandomGateOptions options;
  at::Tensor relevance;
};
TORCH_MODULE(RandomGate);

/// A gate with a target share of heads. Buffer: progress [].
class HEADWISE_API TargetedGateImpl : public GateImpl {
 public:
  at::Tensor penalty() const override;
  void anneal(double progress) override;

  /// The part of the penalty that belongs to this layer alone; undefined where there is none.
  at::Tensor regulariser;
  at::Tensor progress;
  /// Running statistics of the pooled input, where the gate sees its input: [D], [D], [].
  at::Tensor feature_mean, feature_variance, feature_batches;

  /// What the target and its penalty are; gates of equal ones with scope "model" share one target.
  struct Target {
    std::string type, scope, form;
    double target, initial, warmup, strength;
    bool operator==(const Target&) const = default;
  };
  const Target& target() const { return target_; }
  virtual at::Tensor multipliers_or_undefined() const { return {}; }

 protected:
  TargetedGateImpl(Target target, double static_until, double hard_from, int64_t embed_dim,
                   int64_t num_heads, const std::string& execution,
                   const at::TensorOptions& tensor_options);
  void build_features(const at::TensorOptions& tensor_options);
  void reset_features();
  // The masked mean of x, standardised over the inputs seen in training [B, D].
  at::Tensor features(const at::Tensor& x, const at::Tensor& key_padding_mask);

 private:
  Target target_;
};

/// A head budget and a relevance a head, for every input. Parameters: base [H], relevance.weight
/// [H, D], budget_hidden.*, budget_out.* (the last two where the budget is predicted).
class HEADWISE_API BudgetGateImpl : public TargetedGateImpl {
 public:
  BudgetGateImpl(BudgetGateOptions options, int64_t embed_dim, int64_t num_heads,
                 const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;

  BudgetGateOptions options;
  at::Tensor base;
  torch::nn::Linear relevance{nullptr}, budget_hidden{nullptr}, budget_out{nullptr};

 private:
  std::optional<double> fixed_budget_;
};
TORCH_MODULE(BudgetGate);

/// Stochastic gates that can be exactly zero. Parameters: log_alpha [H], relevance.weight [H, D]
/// (input_dependent), multipliers [2] (lagrangian).
class HEADWISE_API HardConcreteGateImpl : public TargetedGateImpl {
 public:
  HardConcreteGateImpl(HardConcreteGateOptions options, int64_t embed_dim, int64_t num_heads,
                       const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;
  at::Tensor multipliers_or_undefined() const override { return multipliers; }

  HardConcreteGateOptions options;
  at::Tensor log_alpha, multipliers;
  torch::nn::Linear relevance{nullptr};
};
TORCH_MODULE(HardConcreteGate);

/// A gate for a layer of these sizes.
HEADWISE_API std::shared_ptr<GateImpl> make_gate(const GateOptions& options, int64_t embed_dim,
                                                 int64_t num_heads,
                                                 const at::TensorOptions& tensor_options = {});

/// The regulariser of every gate in `model` for its last training forward []: gates of target scope
/// "model" share one penalty on the mean share of heads, own terms are averaged. Add it to the
/// loss.
HEADWISE_API at::Tensor penalty(const torch::nn::Module& model);

/// Tells every gate of the model how far training has come, from 0 to 1.
HEADWISE_API void anneal(torch::nn::Module& model, double progress);

}  // namespace headwise

// Gates: modules that turn a layer's input into a selection of heads. The same names, options,
// defaults, parameters and numbers as headwise.*Gate in Python, whose documentation has the
// formulas and their sources.
#pragma once

#include <c10/util/Exception.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/gate_options.h"
#include "headwise/selection.h"

namespace headwise {

/// State shared by gates that decide together (scope "model"); made by link_gates.
struct GateScope;
class Replay;

/// A layer's queries and keys, for gates that choose by them.
struct HeadInputs {
  at::Tensor q;  ///< [B, H, L, d]
  at::Tensor k;  ///< [B, H, S', d], the keys that the layer adds at the end
  std::optional<at::Tensor> key_padding_mask;    ///< bool or floating [B, S]
  std::optional<at::Tensor> query_padding_mask;  ///< bool or floating [B, L]
  std::optional<at::Tensor> attn_mask;           ///< bool or floating [L, S] or [B, H, L, S]
  bool is_causal = false;
  int64_t added_keys = 0;  ///< how many of the keys masks do not cover
};

/// The interface of every gate.
class HEADWISE_API GateImpl : public torch::nn::Module {
 public:
  /// @param x                [B, L, D]
  /// @param key_padding_mask bool (true = padding) or floating [B, L], or undefined
  virtual Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) = 0;

  /// This gate's regulariser for the last training forward []; undefined if it has none.
  virtual at::Tensor penalty() const;

  /// Sets how far training has come, from 0 to 1.
  virtual void anneal(double progress);

  /// Puts the parameters and buffers back to their initial state.
  virtual void reset_parameters() {}
  /// reset_parameters(), and clears the state of every forward, like a new gate.
  virtual void reset();

  /// Whether start_from applies to it: start_gates skips the others.
  virtual bool starts() const { return false; }
  /// Starts the gate from a static choice instead of from all heads.
  /// @param relevance floating [H], positive for heads that the static choice keeps
  /// @param budget    share of the layer's heads that it keeps
  /// @throws c10::ValueError if relevance is not finite or not of shape [H]
  virtual void start_from(const at::Tensor& relevance, double budget);

  /// Whether the gate chooses by queries and keys: the layer then calls forward_heads.
  virtual bool reads_heads() const { return false; }
  virtual Selection forward_heads(const HeadInputs& heads);
  /// Whether the gate also changes how the chosen heads attend: the layer then calls attend, v
  /// [B, H, S', d] -> [B, H, L, d].
  virtual bool attends() const { return false; }
  virtual at::Tensor attend(const HeadInputs& heads, const at::Tensor& v);

  /// Gates of scope "model" with equal keys decide together; empty: this one decides alone.
  virtual std::string scope_key() const { return {}; }
  /// Gives the scope the information about this gate.
  virtual void contribute(GateScope& scope) const;
  /// Takes its place among the gates of `scope`, to which each has contributed.
  virtual void join(const std::shared_ptr<GateScope>& scope, int64_t position);

  int64_t embed_dim() const { return embed_dim_; }
  int64_t num_heads() const { return num_heads_; }
  /// Whether every head runs in training, chosen or not (execution "all").
  bool run_all() const { return run_all_; }

  /// Differentiable [B]: heads the last training forward expected to run; undefined before one.
  at::Tensor expected_heads;

 protected:
  // Checks the sizes. run_all: in training every head runs, chosen or not.
  GateImpl(std::string name, int64_t embed_dim, int64_t num_heads, bool run_all);
  // For a gate with a table of options; checks them.
  GateImpl(const GateOptions& options, int64_t embed_dim, int64_t num_heads);
  void check_input(const at::Tensor& x) const;
  // Whether this forward updates records and statistics: in training, unless activation
  // checkpointing repeats it.
  bool records() const;
  // Makes `copy`, a new gate of the same type and options, a deep copy of this one.
  void copy_to(GateImpl& copy, const std::optional<torch::Device>& device) const;
  // Its state besides parameters, buffers and options, taken from a gate of the same type.
  virtual void take_state(const GateImpl& original);
  void print(std::ostream& stream, const GateOptions& options) const;

 private:
  int64_t embed_dim_, num_heads_;
  bool run_all_;
};

/// Gives a gate clone(), as torch::nn::Cloneable gives it to LibTorch's modules: a copy with its
/// own tensors. In a clone of their model, gates that decide together do so among themselves; a
/// clone of only some of them has to be linked again. Printed are its sizes and the options that
/// are not their defaults.
template <typename Derived, typename Base>
class HEADWISE_API CloneableGate : public Base {
 public:
  using Base::Base;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override {
    const auto& self = static_cast<const Derived&>(*this);
    auto copy = std::make_shared<Derived>(self.options, self.embed_dim(), self.num_heads());
    self.copy_to(*copy, device);
    return copy;
  }
  void pretty_print(std::ostream& stream) const override {
    this->print(stream, static_cast<const Derived&>(*this).options);
  }

 private:
  void clone_(torch::nn::Module& original, const std::optional<torch::Device>& device) final {
    const auto copy = std::dynamic_pointer_cast<Derived>(original.clone(device));
    TORCH_CHECK(copy, "the clone of a ", original.name(), " must not replace a ", this->name());
    static_cast<Derived&>(*this) = *copy;
  }
};

/// The same heads for every input. Buffer: scale [H].
class HEADWISE_API FixedGateImpl : public CloneableGate<FixedGateImpl, GateImpl> {
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
class HEADWISE_API RandomGateImpl : public CloneableGate<RandomGateImpl, GateImpl> {
 public:
  RandomGateImpl(RandomGateOptions options, int64_t embed_dim, int64_t num_heads,
                 const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;

  RandomGateOptions options;
  at::Tensor relevance;
};
TORCH_MODULE(RandomGate);

/// A gate that is trained. Buffer: progress [], what anneal sets.
class HEADWISE_API ScheduledGateImpl : public GateImpl {
 public:
  void anneal(double progress) override;

  bool starts() const override { return true; }
  void start_from(const at::Tensor& relevance, double budget) override;

  at::Tensor progress;
  /// Running statistics of the pooled input, if the gate sees its input: [D], [D], [].
  at::Tensor feature_mean, feature_variance, feature_batches;

 protected:
  ScheduledGateImpl(const GateOptions& options, int64_t embed_dim, int64_t num_heads,
                    const at::TensorOptions& tensor_options);
  void build_features(const at::TensorOptions& tensor_options);
  void reset_features();
  // The masked mean of x, standardised over the inputs seen in training [B, D].
  at::Tensor features(const at::Tensor& x, const at::Tensor& key_padding_mask);
  // base [H] + weight [H, D] features / sqrt(D); in training base alone until progress reaches
  // static_until [B, H].
  at::Tensor relevance_of(const at::Tensor& x, const at::Tensor& key_padding_mask,
                          const at::Tensor& base, const at::Tensor& weight, double static_until);
  virtual void start(const at::Tensor& relevance, double budget) = 0;

  std::shared_ptr<Replay> replay_;  // what forwards used that may be repeated
};

/// A gate with a target share of heads.
class HEADWISE_API TargetedGateImpl : public ScheduledGateImpl {
 public:
  at::Tensor penalty() const override;
  void reset() override;

  /// The part of the penalty that belongs to this layer alone; undefined if there is none.
  at::Tensor regulariser;

  /// The target and its penalty; gates with equal ones and scope "model" share one target.
  struct Target {
    std::string type, scope, form;
    double keep, initial_keep, warmup, strength;
  };
  const Target& target() const { return target_; }
  virtual at::Tensor multipliers_or_undefined() const { return {}; }

 protected:
  // `options` have those of every gate with a target.
  template <typename Options>
  TargetedGateImpl(const Options& options, std::string form, double strength, int64_t embed_dim,
                   int64_t num_heads, const at::TensorOptions& tensor_options)
      : ScheduledGateImpl(options, embed_dim, num_heads, tensor_options),
        target_{Options::kType,         options.target_scope(), std::move(form), options.keep(),
                options.initial_keep(), options.warmup(),       strength} {}

 private:
  Target target_;
};

/// A head budget and a relevance per head, for every input. Parameters: base [H], relevance.weight
/// [H, D], budget_hidden.*, budget_out.* (the last two if the budget is predicted).
class HEADWISE_API BudgetGateImpl : public CloneableGate<BudgetGateImpl, TargetedGateImpl> {
 public:
  BudgetGateImpl(BudgetGateOptions options, int64_t embed_dim, int64_t num_heads,
                 const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;

  BudgetGateOptions options;
  at::Tensor base;
  torch::nn::Linear relevance{nullptr}, budget_hidden{nullptr}, budget_out{nullptr};

 private:
  void start(const at::Tensor& relevance, double budget) override;
  void set_budget(double budget);

  std::optional<double> fixed_budget_;
};
TORCH_MODULE(BudgetGate);

/// Stochastic gates that can be exactly zero. Parameters: log_alpha [H], relevance.weight [H, D]
/// (input_dependent), multipliers [2] (lagrangian).
class HEADWISE_API HardConcreteGateImpl
    : public CloneableGate<HardConcreteGateImpl, TargetedGateImpl> {
 public:
  HardConcreteGateImpl(HardConcreteGateOptions options, int64_t embed_dim, int64_t num_heads,
                       const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;
  at::Tensor multipliers_or_undefined() const override { return multipliers; }

  HardConcreteGateOptions options;
  at::Tensor log_alpha, multipliers;
  torch::nn::Linear relevance{nullptr};

 private:
  void start(const at::Tensor& relevance, double budget) override;
};
TORCH_MODULE(HardConcreteGate);

/// A gate that decides together with those of the other layers (scope "model", see link_gates) or
/// for its own layer only ("layer").
class HEADWISE_API ScopedGateImpl : public ScheduledGateImpl {
 public:
  std::string scope_key() const override { return key_; }
  void join(const std::shared_ptr<GateScope>& scope, int64_t position) override;

 protected:
  ScopedGateImpl(const GateOptions& options, int64_t embed_dim, int64_t num_heads,
                 const at::TensorOptions& tensor_options)
      : ScheduledGateImpl(options, embed_dim, num_heads, tensor_options) {}
  // For the end of a constructor. Gates of scope "model" with equal `options` decide together.
  void set_scope(const std::string& scope, const GateOptions& options);
  // Its scope; null if it is not linked.
  GateScope* linked() const { return scope_.get(); }
  // The same. @throws c10::Error if it is not linked
  GateScope& scope() const;
  int64_t position() const { return position_; }
  void take_state(const GateImpl& original) override;

 private:
  std::string key_;
  std::shared_ptr<GateScope> scope_;
  int64_t position_ = 0;
};

/// k heads of a model, the same for every input. Parameter: scores [H].
class HEADWISE_API SubsetGateImpl : public CloneableGate<SubsetGateImpl, ScopedGateImpl> {
 public:
  SubsetGateImpl(SubsetGateOptions options, int64_t embed_dim, int64_t num_heads,
                 const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;
  void contribute(GateScope& scope) const override;
  /// @throws c10::ValueError if k is more than the heads of the scope
  void join(const std::shared_ptr<GateScope>& scope, int64_t position) override;

  SubsetGateOptions options;
  at::Tensor scores;

 private:
  void take_state(const GateImpl& original) override;
  void start(const at::Tensor& relevance, double budget) override;

  int64_t k_ = 0;
};
TORCH_MODULE(SubsetGate);

/// The share of the heads to run is an argument at run time. Parameters: base [H], tilt [H],
/// relevance.weight [H, D].
class HEADWISE_API RequestedBudgetGateImpl
    : public CloneableGate<RequestedBudgetGateImpl, ScopedGateImpl> {
 public:
  RequestedBudgetGateImpl(RequestedBudgetGateOptions options, int64_t embed_dim, int64_t num_heads,
                          const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;
  void reset() override;
  void contribute(GateScope& scope) const override;

  /// Sets the budget of evaluation from now on.
  /// @param budget floating [] or [B], each in (0, 1]
  /// @throws c10::ValueError if it is not
  void request(const at::Tensor& budget);

  RequestedBudgetGateOptions options;
  at::Tensor base, tilt;
  torch::nn::Linear relevance{nullptr};

 private:
  void take_state(const GateImpl& original) override;
  void start(const at::Tensor& relevance, double budget) override;

  at::Tensor requested_;  // [] or [B]
};
TORCH_MODULE(RequestedBudgetGate);

/// One sigmoid per head with Gumbel noise, cut at one half. Parameters: logit [H], relevance.weight
/// [H, D].
class HEADWISE_API GumbelSigmoidGateImpl
    : public CloneableGate<GumbelSigmoidGateImpl, TargetedGateImpl> {
 public:
  GumbelSigmoidGateImpl(GumbelSigmoidGateOptions options, int64_t embed_dim, int64_t num_heads,
                        const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;

  GumbelSigmoidGateOptions options;
  at::Tensor logit;
  torch::nn::Linear relevance{nullptr};

 private:
  void start(const at::Tensor& relevance, double budget) override;
};
TORCH_MODULE(GumbelSigmoidGate);

/// One head that SleepGate put to sleep or woke.
struct HeadMove {
  int64_t step;      ///< training forwards before it
  double progress;   ///< of annealing
  int64_t position;  ///< of the gate among those it decides with
  int64_t head;
  bool wakes;    ///< false: it falls asleep
  double score;  ///< of the head, when it moved
};

/// Puts the least important heads to sleep in training, and wakes them when their scores recover.
/// Buffers: awake [H], score [H], steps [].
class HEADWISE_API SleepGateImpl : public CloneableGate<SleepGateImpl, ScopedGateImpl> {
 public:
  SleepGateImpl(SleepGateOptions options, int64_t embed_dim, int64_t num_heads,
                const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  void reset_parameters() override;
  void reset() override;
  void contribute(GateScope& scope) const override;

  /// The moves in this layer, oldest first.
  std::vector<HeadMove> moves() const;
  /// Replaces them, once the gate is linked; the moves' `position` does not matter.
  void set_moves(const std::vector<HeadMove>& moves);

  SleepGateOptions options;
  at::Tensor awake, score, steps;

 private:
  void start(const at::Tensor& relevance, double budget) override;
  void advance();
};
TORCH_MODULE(SleepGate);

/// Drops heads by the integer parts of their queries and keys; nothing is trained. Buffer:
/// threshold [].
class HEADWISE_API ThresholdGateImpl : public CloneableGate<ThresholdGateImpl, GateImpl> {
 public:
  ThresholdGateImpl(ThresholdGateOptions options, int64_t embed_dim, int64_t num_heads,
                    const at::TensorOptions& tensor_options = {});
  /// @throws c10::Error always: it needs queries and keys
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  bool reads_heads() const override { return true; }
  Selection forward_heads(const HeadInputs& heads) override;
  bool attends() const override;
  at::Tensor attend(const HeadInputs& heads, const at::Tensor& v) override;
  void reset_parameters() override;

  ThresholdGateOptions options;
  at::Tensor threshold;
};
TORCH_MODULE(ThresholdGate);

/// Some heads run for every input; another gate chooses among the rest. Buffer: shared [s];
/// submodule: gate, bound to H - s heads.
class HEADWISE_API SharedHeadsGateImpl : public CloneableGate<SharedHeadsGateImpl, GateImpl> {
 public:
  SharedHeadsGateImpl(SharedHeadsGateOptions options, int64_t embed_dim, int64_t num_heads,
                      const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  bool starts() const override { return true; }
  /// The heads of largest relevance become the shared ones; the inner gate starts with the rest.
  void start_from(const at::Tensor& relevance, double budget) override;
  void reset_parameters() override;
  void reset() override;

  SharedHeadsGateOptions options;
  at::Tensor shared;
  std::shared_ptr<GateImpl> gate;
};
TORCH_MODULE(SharedHeadsGate);

/// Chooses whole groups of query heads: those that share a key/value head. Buffer: place [H], the
/// group of each head; submodule: gate, bound to one head per group. GroupedQueryAttention gives it
/// its groups; in MultiheadAttention each head is one.
class HEADWISE_API GroupGateImpl : public CloneableGate<GroupGateImpl, GateImpl> {
 public:
  GroupGateImpl(GroupGateOptions options, int64_t embed_dim, int64_t num_heads,
                const at::TensorOptions& tensor_options = {});
  /// @param groups for each head the number of its group, ascending from 0
  /// @throws c10::ValueError if they are not, or the inner gate reads queries and keys
  GroupGateImpl(GroupGateOptions options, int64_t embed_dim, const std::vector<int64_t>& groups,
                const at::TensorOptions& tensor_options = {});
  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask = {}) override;
  bool starts() const override { return gate->starts(); }
  /// The inner gate starts with the mean relevance of each group's heads.
  void start_from(const at::Tensor& relevance, double budget) override;
  void reset_parameters() override;
  void reset() override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  GroupGateOptions options;
  at::Tensor place;
  std::shared_ptr<GateImpl> gate;

 private:
  std::vector<int64_t> groups_;
};
TORCH_MODULE(GroupGate);

/// A gate for a layer of these sizes.
HEADWISE_API std::shared_ptr<GateImpl> make_gate(const GateOptions& options, int64_t embed_dim,
                                                 int64_t num_heads,
                                                 const at::TensorOptions& tensor_options = {});

/// The regulariser of every gate in `model` for its last training forward []: gates of target scope
/// "model" share one penalty on the mean share of heads; terms of single layers are averaged. Add
/// it to the loss.
HEADWISE_API at::Tensor penalty(const torch::nn::Module& model);

/// Tells every gate of the model how far training has come, from 0 to 1.
HEADWISE_API void anneal(torch::nn::Module& model, double progress);

/// Links the gates of scope "model" that have equal options, so that each set decides as one. Call
/// it when the gates of a model are in place; load does. Linking again is allowed.
/// @throws c10::ValueError if the options do not fit the number of heads
HEADWISE_API void link_gates(torch::nn::Module& model);

/// Makes every RequestedBudgetGate of the model run this share of the heads from now on: [] for all
/// sequences, or [B], one per sequence.
/// @throws c10::ValueError if a value is outside (0, 1], or the model has no such gate
HEADWISE_API void request_budget(torch::nn::Module& model, const at::Tensor& budget);
HEADWISE_API void request_budget(torch::nn::Module& model, double budget);

/// Starts the gates of a model from an importance ranking of its heads: relevance at sharpness *
/// (rank - (1 - keep)), rank in [0, 1] over the heads of all layers; a layer's budget at the share
/// of its heads among the `keep` most important.
/// @param importance for every gate that is trained, by the name of its attention layer, one score
/// per head [H]
/// @throws c10::ValueError if keep is outside (0, 1], a gate has no score, or the wrong number
HEADWISE_API void start_gates(torch::nn::Module& model,
                              const std::map<std::string, at::Tensor>& importance, double keep,
                              double sharpness = 8.0);

}  // namespace headwise

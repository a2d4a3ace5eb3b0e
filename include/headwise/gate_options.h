// Options of gates: one table per gate, which C++ and Python both read, and their form in files.
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

/// The rule for the value of an option, besides its type.
struct OptionRule {
  enum class Kind {
    kNone,
    kFraction,     ///< in (0, 1]
    kUnit,         ///< in [0, 1]
    kDecay,        ///< in [0, 1)
    kRatio,        ///< in (-1, 1)
    kFinite,       ///< finite
    kPositive,     ///< finite, above 0
    kNotNegative,  ///< finite, 0 or above
    kAtLeast,      ///< a whole number, `least` or above
    kChoice,       ///< one of `choices`
    kHeads,        ///< numbers of heads, none of them twice
  };
  Kind kind = Kind::kNone;
  int64_t least = 0;
  const char* choices = "";  ///< separated by ", "
};

namespace rules {
inline constexpr OptionRule none{};
inline constexpr OptionRule fraction{OptionRule::Kind::kFraction};
inline constexpr OptionRule unit{OptionRule::Kind::kUnit};
inline constexpr OptionRule decay{OptionRule::Kind::kDecay};
inline constexpr OptionRule ratio{OptionRule::Kind::kRatio};
inline constexpr OptionRule finite{OptionRule::Kind::kFinite};
inline constexpr OptionRule positive{OptionRule::Kind::kPositive};
inline constexpr OptionRule not_negative{OptionRule::Kind::kNotNegative};
inline constexpr OptionRule heads{OptionRule::Kind::kHeads};
constexpr OptionRule at_least(int64_t least) { return {OptionRule::Kind::kAtLeast, least}; }
constexpr OptionRule choice(const char* choices) { return {OptionRule::Kind::kChoice, 0, choices}; }
}  // namespace rules

// A table of options is a macro of rows (type, name, default, rule, documentation), in the order of
// Python's arguments. From it come the setters and getters of NAMEOptions, their checks, their form
// in files, and the signature, checks and documentation of the Python class.
#define HEADWISE_DECLARE_OPTION(type, name, initial, rule, doc) TORCH_ARG(type, name) = initial;
#define HEADWISE_VISIT_OPTION(type, name, initial, rule, doc) \
  visit(#name, options.name(), rules::rule, doc);
#define HEADWISE_GATE_OPTIONS(Name, TABLE)                       \
  struct HEADWISE_API Name##Options {                            \
    static constexpr const char* kType = #Name;                  \
    TABLE(HEADWISE_DECLARE_OPTION)                               \
   public:                                                       \
    /** Calls visit(name, value, rule, doc) for every option. */ \
    template <typename Options, typename Visit>                  \
    static void visit(Options& options, Visit&& visit) {         \
      TABLE(HEADWISE_VISIT_OPTION)                               \
    }                                                            \
  };

// clang-format off
#define HEADWISE_EXECUTION(OPTION, initial) \
  OPTION(std::string, execution, initial, choice("all, selected"), "in training, 'all' runs every head, so that gradients reach the weights of heads that were not chosen; 'selected' runs only the chosen ones, which is cheaper")

// Common options of gates that are trained towards a share of the heads.
#define HEADWISE_TARGET(OPTION) \
  OPTION(std::string, target_scope, "model", choice("model, layer"), "'model': one target for the mean over all layers (through penalty()); 'layer': one for each") \
  OPTION(double, warmup, 0.3, unit, "progress at which the target share reaches keep, starting from initial_keep") \
  OPTION(double, initial_keep, 0.95, fraction, "the target share at the start of training") \
  OPTION(double, static_until, 0.4, unit, "progress from which the part that sees the input is trained") \
  OPTION(double, hard_from, 0.75, not_negative, "progress from which training runs the hard selection of evaluation, without noise; above 1: never")

#define HEADWISE_FIXED_GATE(OPTION) \
  OPTION(std::optional<std::vector<int64_t>>, heads, std::nullopt, heads, "the heads that run, with weight one; default: all") \
  OPTION(std::optional<std::vector<double>>, scale, std::nullopt, finite, "instead of heads: a weight per head; 0 = does not run") \
  HEADWISE_EXECUTION(OPTION, "selected")

#define HEADWISE_RANDOM_GATE(OPTION) \
  OPTION(double, keep, 0.5, fraction, "share of the heads that run; the count is round(keep * H) and at least one") \
  OPTION(bool, per_input, true, none, "draw for every sequence, in training and in evaluation; otherwise once, when the gate is bound") \
  HEADWISE_EXECUTION(OPTION, "selected")

#define HEADWISE_BUDGET_GATE(OPTION) \
  OPTION(double, keep, 0.5, fraction, "mean share of the heads to run; 1 fixes the budget at 1, which is the dense layer exactly") \
  OPTION(std::optional<double>, budget, std::nullopt, fraction, "fixes the budget of every input instead of predicting it; only which heads run then depends on the input") \
  OPTION(double, min_budget, 0.1, fraction, "lower bound of the budget; outside the bounds only the penalty's hinge acts on it") \
  OPTION(double, max_budget, 1.0, fraction, "upper bound of the budget") \
  OPTION(std::optional<int64_t>, hidden_dim, std::nullopt, at_least(1), "width of the budget's network; default max(8, embed_dim // 8)") \
  OPTION(int64_t, min_heads, 1, at_least(0), "no input runs fewer heads") \
  OPTION(std::string, rounding, "round", choice("round, ceil"), "'round' (half up) or 'ceil' (the paper's; runs half a head more on average than the penalty sees)") \
  OPTION(double, strength, 20.0, not_negative, "factor of the squared distance from the target share") \
  OPTION(double, bounds_strength, 1.0, not_negative, "factor of the squared hinge that holds the budget inside its bounds") \
  OPTION(double, entropy_strength, 0.0, finite, "factor of the entropy of softmax(relevance), rewarded at the start and penalised at the end of annealing; 0 leaves exploration to noise and temperature") \
  OPTION(double, temperature, 0.5, positive, "of the relaxation, at the start") \
  OPTION(double, final_temperature, 0.1, positive, "of the relaxation, when the hard selection begins") \
  OPTION(std::string, noise, "gumbel", choice("gumbel, normal"), "distribution of the noise on the relevance in training") \
  OPTION(double, noise_scale, 0.5, not_negative, "of the noise at the start; falls linearly to 0 at hard_from") \
  OPTION(std::string, relaxation, "exact_mass", choice("exact_mass, straight_through"), "'straight_through': the hard selection from the start, with the gradient of the soft weights") \
  OPTION(std::string, kept_weight, "one", choice("one, soft"), "weight of a kept head once the selection is hard: 'one', or 'soft' (its m_h), in evaluation and in training alike") \
  HEADWISE_TARGET(OPTION) \
  HEADWISE_EXECUTION(OPTION, "all")

#define HEADWISE_HARD_CONCRETE_GATE(OPTION) \
  OPTION(double, keep, 0.5, fraction, "mean share of the heads to run; not used by penalty='l0'") \
  OPTION(bool, input_dependent, false, none, "add the part that sees the input") \
  OPTION(std::string, penalty, "squared", choice("squared, lagrangian, l0"), "'squared': strength (share - keep)^2; 'lagrangian': strength (m_0 d + m_1 d^2) of d = share - keep, two multipliers that the same optimiser ascends (Xia et al. 2022); 'l0': strength times the expected number of open heads per layer (Voita et al.)") \
  OPTION(std::optional<double>, strength, std::nullopt, not_negative, "see penalty; default 20, and 0.1 for 'l0' (Voita et al.)") \
  OPTION(std::string, kept_weight, "gate", choice("gate, one"), "'gate': the value of the gate; 'one': no samples, a head is open, with weight 1, if P(g > 0) > 1/2, with the gradient of P(g > 0). Ours") \
  OPTION(std::string, noise_per, "sequence", choice("sequence, batch"), "draw the samples' noise for each sequence, or once per batch (Voita et al.)") \
  OPTION(double, init_log_alpha, 3.0, finite, "initial value; 3 opens every gate fully in evaluation") \
  OPTION(double, beta, 0.33, positive, "temperature of the samples") \
  OPTION(double, gamma, -0.1, finite, "lower end of the stretch, below 0") \
  OPTION(double, zeta, 1.1, finite, "upper end of the stretch, above 1") \
  HEADWISE_TARGET(OPTION) \
  HEADWISE_EXECUTION(OPTION, "all")

#define HEADWISE_SUBSET_GATE(OPTION) \
  OPTION(std::optional<int64_t>, k, std::nullopt, at_least(1), "heads that run: of the whole model, or of each layer with scope='layer'") \
  OPTION(double, keep, 0.5, fraction, "if k is not given: the share of the heads, rounded half up, at least one head") \
  OPTION(std::string, scope, "model", choice("model, layer"), "'model': one choice among the heads of all layers (see link_gates()); 'layer': one for each layer") \
  OPTION(std::string, estimator, "gumbel", choice("gumbel, straight_through"), "how the choice is relaxed in training") \
  OPTION(double, temperature, 1000.0, positive, "of the relaxation, at the start; the authors' 1000 gives all heads nearly equal weights at first; for a short training from a ranking start near 1") \
  OPTION(double, final_temperature, 0.1, positive, "of the relaxation, from cooled_at on; the authors go to 1e-8") \
  OPTION(double, cooled_at, 0.68, unit, "progress at which final_temperature is reached") \
  OPTION(double, hard_from, 0.75, not_negative, "progress from which training runs the hard choice; above 1: never") \
  HEADWISE_EXECUTION(OPTION, "all")

#define HEADWISE_REQUESTED_BUDGET_GATE(OPTION) \
  OPTION(double, budget, 0.5, fraction, "the budget of evaluation until another one is requested") \
  OPTION(double, min_budget, 0.1, fraction, "lower bound of the budgets drawn in training; smaller ones are untrained") \
  OPTION(double, max_budget, 1.0, fraction, "upper bound of the budgets drawn in training") \
  OPTION(std::string, scope, "model", choice("model, layer"), "'model': the budget is divided among the layers (see link_gates()); 'layer': each layer runs that share of its own heads") \
  OPTION(int64_t, min_heads, 0, at_least(0), "no layer runs fewer heads; above 0 a model may run more than requested") \
  OPTION(double, temperature, 0.5, positive, "of the relaxation, at the start") \
  OPTION(double, final_temperature, 0.1, positive, "of the relaxation, when the hard selection begins") \
  OPTION(double, noise_scale, 0.5, not_negative, "of the Gumbel noise at the start; falls linearly to 0 at hard_from") \
  OPTION(double, static_until, 0.4, unit, "progress from which the part that sees the input is trained") \
  OPTION(double, hard_from, 0.75, not_negative, "progress from which training runs the hard selection; above 1: never") \
  HEADWISE_EXECUTION(OPTION, "all")

#define HEADWISE_GUMBEL_SIGMOID_GATE(OPTION) \
  OPTION(double, keep, 0.5, fraction, "mean share of the heads to run") \
  OPTION(std::string, penalty, "squared", choice("squared, adavit"), "'squared': strength (share - keep)^2, the paper's usage loss; 'adavit': the losses of the released code, strength (|share - keep| + 0.1 d - 0.1 e), with d the mean over heads of |share of the inputs that run a head - keep| and e the mean entropy of the probabilities") \
  OPTION(std::optional<double>, strength, std::nullopt, not_negative, "see penalty; default 20, and 2 for 'adavit' (the released code)") \
  OPTION(double, temperature, 5.0, positive, "of the sigmoid in training") \
  OPTION(double, init_logit, 3.0, finite, "initial value; 3 opens every head") \
  HEADWISE_TARGET(OPTION) \
  HEADWISE_EXECUTION(OPTION, "all")

#define HEADWISE_SLEEP_GATE(OPTION) \
  OPTION(double, keep, 0.5, fraction, "share of the heads that are awake at the end; at least one head") \
  OPTION(std::string, scope, "model", choice("model, layer"), "'model': heads of all layers compete (see link_gates()); 'layer': those of each layer") \
  OPTION(int64_t, every, 10, at_least(1), "training steps from one decision to the next") \
  OPTION(double, margin, 0.2, not_negative, "how much better a sleeping head must score than one that is awake to replace it") \
  OPTION(double, decay, 0.9, decay, "of the running average of scores") \
  OPTION(double, asleep_by, 0.3, unit, "progress at which the final number of heads sleep; until then it grows linearly") \
  OPTION(double, settled_from, 0.75, not_negative, "progress from which no head moves; above 1: never") \
  OPTION(int64_t, probe_every, 4, at_least(1), "with execution='selected': every head runs once in this many steps, so that sleeping ones are scored") \
  HEADWISE_EXECUTION(OPTION, "all")

#define HEADWISE_THRESHOLD_GATE(OPTION) \
  OPTION(double, threshold, 0.0, not_negative, "a head whose importance is not above it does not run; depends on the model: calibrate_threshold() finds it for a share of heads") \
  OPTION(bool, normalize, true, none, "divide the importance by the number of scores that it sums up") \
  OPTION(int64_t, min_heads, 1, at_least(0), "no input runs fewer heads (the most important ones)") \
  OPTION(double, resolution, 1.0, positive, "queries and keys are multiplied by it before their integer parts are taken; 4 keeps two binary places more") \
  OPTION(int64_t, block, 2, at_least(1), "rows and columns of a block of scores") \
  OPTION(std::optional<double>, block_ratio, std::nullopt, ratio, "rho in (-1, 1): prune blocks of scores; default: none") \
  OPTION(bool, approximate, false, none, "leave out the product of the fractions") \
  HEADWISE_EXECUTION(OPTION, "selected")

#define HEADWISE_SHARED_HEADS_GATE(OPTION) \
  OPTION(GateOptionsBox, gate, {}, none, "the gate that chooses among the other heads, unbound") \
  OPTION(std::vector<int64_t>, shared, std::vector<int64_t>(1, 0), heads, "which heads run for every input, or how many: the first ones until start_gates() chooses")

#define HEADWISE_GROUP_GATE(OPTION) \
  OPTION(GateOptionsBox, gate, {}, none, "the gate that chooses among the groups, unbound")
// clang-format on

/// Example: FixedGateOptions().heads({0, 3})
HEADWISE_GATE_OPTIONS(FixedGate, HEADWISE_FIXED_GATE)
/// Example: RandomGateOptions().keep(0.25)
HEADWISE_GATE_OPTIONS(RandomGate, HEADWISE_RANDOM_GATE)
/// BudgetFormer, arXiv 2604.22583. Example: BudgetGateOptions().keep(0.5)
HEADWISE_GATE_OPTIONS(BudgetGate, HEADWISE_BUDGET_GATE)
/// arXiv 1905.09418. Example: HardConcreteGateOptions().keep(0.5).input_dependent(true)
HEADWISE_GATE_OPTIONS(HardConcreteGate, HEADWISE_HARD_CONCRETE_GATE)
/// Li, Cotterell and Sachan 2021, arXiv 2108.04657. Example: SubsetGateOptions().k(18)
HEADWISE_GATE_OPTIONS(SubsetGate, HEADWISE_SUBSET_GATE)
/// arXiv 2605.02697. Example: RequestedBudgetGateOptions().budget(0.25)
HEADWISE_GATE_OPTIONS(RequestedBudgetGate, HEADWISE_REQUESTED_BUDGET_GATE)
/// AdaViT, arXiv 2111.15668. Example: GumbelSigmoidGateOptions().keep(0.5)
HEADWISE_GATE_OPTIONS(GumbelSigmoidGate, HEADWISE_GUMBEL_SIGMOID_GATE)
/// Example: SleepGateOptions().keep(0.5).every(20)
HEADWISE_GATE_OPTIONS(SleepGate, HEADWISE_SLEEP_GATE)
/// Jaradat et al. 2024, arXiv 2407.12893. Example: ThresholdGateOptions().threshold(0.4)
HEADWISE_GATE_OPTIONS(ThresholdGate, HEADWISE_THRESHOLD_GATE)

struct AnyGateOptions;

/// A gate's options inside another's; empty until set.
class GateOptionsBox {
 public:
  GateOptionsBox() = default;
  template <typename Options>
  GateOptionsBox(Options options);  // NOLINT: what .gate(BudgetGateOptions()) converts

  /// Null if there are none.
  const AnyGateOptions* get() const { return held_.get(); }

 private:
  std::shared_ptr<const AnyGateOptions> held_;
};

/// After MoH, arXiv 2410.11842.
/// Example: SharedHeadsGateOptions().gate(BudgetGateOptions()).shared({0, 1})
HEADWISE_GATE_OPTIONS(SharedHeadsGate, HEADWISE_SHARED_HEADS_GATE)
/// Whole groups of query heads. Example: GroupGateOptions().gate(BudgetGateOptions().keep(0.5))
HEADWISE_GATE_OPTIONS(GroupGate, HEADWISE_GROUP_GATE)

/// Any gate's options, for MultiheadAttentionOptions::gate and GroupedQueryAttentionOptions::gate.
using GateOptions =
    std::variant<FixedGateOptions, RandomGateOptions, BudgetGateOptions, HardConcreteGateOptions,
                 SubsetGateOptions, RequestedBudgetGateOptions, GumbelSigmoidGateOptions,
                 SleepGateOptions, ThresholdGateOptions, SharedHeadsGateOptions, GroupGateOptions>;

struct AnyGateOptions {
  GateOptions options;
};

template <typename Options>
GateOptionsBox::GateOptionsBox(Options options)
    : held_(std::make_shared<const AnyGateOptions>(AnyGateOptions{std::move(options)})) {}

/// {"type": "BudgetGate", "keep": 0.5, ...}, as Python's Gate.config() gives it.
HEADWISE_API std::string gate_options_to_json(const GateOptions& options);

/// @throws c10::ValueError for malformed JSON, an unknown type or option (by name), a value out of
///         its range; c10::TypeError for a value of the wrong kind
HEADWISE_API GateOptions gate_options_from_json(std::string_view json);

/// @throws c10::ValueError if an option is out of its range, or options contradict each other
HEADWISE_API void check_gate_options(const GateOptions& options);

}  // namespace headwise

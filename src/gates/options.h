// Every gate's options, field by field, named once: for reading, for writing, for telling whether
// two gates are alike.
#pragma once

#include <type_traits>

#include "headwise/gates.h"

namespace headwise {

/// GateFields<Options>::kType is the gate's name in files, Gate its module, and visit(options, f)
/// calls f(field name, value) for every field.
template <typename Options>
struct GateFields;

template <>
struct GateFields<FixedGateOptions> {
  static constexpr const char* kType = "FixedGate";
  using Gate = FixedGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("heads", o.heads());
    visit("scale", o.scale());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<RandomGateOptions> {
  static constexpr const char* kType = "RandomGate";
  using Gate = RandomGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("keep", o.keep());
    visit("per_input", o.per_input());
    visit("execution", o.execution());
  }
};

// What every gate with a target has.
template <typename O, typename Visit>
void visit_target(O& o, Visit&& visit) {
  visit("target", o.target());
  visit("target_scope", o.target_scope());
  visit("strength", o.strength());
  visit("warmup", o.warmup());
  visit("static_until", o.static_until());
  visit("hard_from", o.hard_from());
}

template <>
struct GateFields<BudgetGateOptions> {
  static constexpr const char* kType = "BudgetGate";
  using Gate = BudgetGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit_target(o, visit);
    visit("budget", o.budget());
    visit("min_budget", o.min_budget());
    visit("max_budget", o.max_budget());
    visit("initial_budget", o.initial_budget());
    visit("hidden_dim", o.hidden_dim());
    visit("min_heads", o.min_heads());
    visit("rounding", o.rounding());
    visit("bounds_strength", o.bounds_strength());
    visit("entropy_strength", o.entropy_strength());
    visit("temperature", o.temperature());
    visit("final_temperature", o.final_temperature());
    visit("noise", o.noise());
    visit("noise_scale", o.noise_scale());
    visit("relaxation", o.relaxation());
    visit("kept_weight", o.kept_weight());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<HardConcreteGateOptions> {
  static constexpr const char* kType = "HardConcreteGate";
  using Gate = HardConcreteGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit_target(o, visit);
    visit("input_dependent", o.input_dependent());
    visit("penalty", o.penalty());
    visit("kept_weight", o.kept_weight());
    visit("init_log_alpha", o.init_log_alpha());
    visit("beta", o.beta());
    visit("gamma", o.gamma());
    visit("zeta", o.zeta());
    visit("initial_target", o.initial_target());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<SubsetGateOptions> {
  static constexpr const char* kType = "SubsetGate";
  using Gate = SubsetGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("k", o.k());
    visit("keep", o.keep());
    visit("scope", o.scope());
    visit("estimator", o.estimator());
    visit("temperature", o.temperature());
    visit("final_temperature", o.final_temperature());
    visit("cooled_at", o.cooled_at());
    visit("hard_from", o.hard_from());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<RequestedBudgetGateOptions> {
  static constexpr const char* kType = "RequestedBudgetGate";
  using Gate = RequestedBudgetGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("budget", o.budget());
    visit("min_budget", o.min_budget());
    visit("max_budget", o.max_budget());
    visit("scope", o.scope());
    visit("min_heads", o.min_heads());
    visit("temperature", o.temperature());
    visit("final_temperature", o.final_temperature());
    visit("noise_scale", o.noise_scale());
    visit("static_until", o.static_until());
    visit("hard_from", o.hard_from());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<GumbelSigmoidGateOptions> {
  static constexpr const char* kType = "GumbelSigmoidGate";
  using Gate = GumbelSigmoidGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit_target(o, visit);
    visit("temperature", o.temperature());
    visit("init_logit", o.init_logit());
    visit("initial_target", o.initial_target());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<SleepGateOptions> {
  static constexpr const char* kType = "SleepGate";
  using Gate = SleepGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("keep", o.keep());
    visit("scope", o.scope());
    visit("every", o.every());
    visit("margin", o.margin());
    visit("decay", o.decay());
    visit("asleep_by", o.asleep_by());
    visit("settled_from", o.settled_from());
    visit("probe_every", o.probe_every());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<ThresholdGateOptions> {
  static constexpr const char* kType = "ThresholdGate";
  using Gate = ThresholdGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("threshold", o.threshold());
    visit("normalize", o.normalize());
    visit("min_heads", o.min_heads());
    visit("resolution", o.resolution());
    visit("block", o.block());
    visit("block_ratio", o.block_ratio());
    visit("approximate", o.approximate());
    visit("execution", o.execution());
  }
};

template <>
struct GateFields<SharedHeadsGateOptions> {
  static constexpr const char* kType = "SharedHeadsGate";
  using Gate = SharedHeadsGateImpl;
  template <typename O, typename Visit>
  static void visit(O& o, Visit&& visit) {
    visit("shared", o.shared());
    Inner<O> inner{o};
    visit("gate", inner);
  }

  // The gate inside, which is read and written as an object of its own.
  template <typename O>
  struct Inner {
    O& outer;
  };
};

template <typename T>
struct IsInnerGate : std::false_type {};
template <typename O>
struct IsInnerGate<GateFields<SharedHeadsGateOptions>::Inner<O>> : std::true_type {};

}  // namespace headwise

// Functions over all the gates of a model.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <map>

#include "gates/helpers.h"
#include "gates/model_gates.h"
#include "gates/options.h"
#include "gates/scope.h"
#include "ops/gates/budget.h"
#include "ops/gates/hard_concrete.h"
#include "ops/gates/penalty.h"
#include "shown.h"

namespace headwise {
namespace {

template <typename Options>
struct ModuleOf;
#define HEADWISE_MODULE_OF(Name)   \
  template <>                      \
  struct ModuleOf<Name##Options> { \
    using type = Name##Impl;       \
  };
HEADWISE_MODULE_OF(FixedGate)
HEADWISE_MODULE_OF(RandomGate)
HEADWISE_MODULE_OF(BudgetGate)
HEADWISE_MODULE_OF(HardConcreteGate)
HEADWISE_MODULE_OF(SubsetGate)
HEADWISE_MODULE_OF(RequestedBudgetGate)
HEADWISE_MODULE_OF(GumbelSigmoidGate)
HEADWISE_MODULE_OF(SleepGate)
HEADWISE_MODULE_OF(ThresholdGate)
HEADWISE_MODULE_OF(SharedHeadsGate)
HEADWISE_MODULE_OF(GroupGate)

}  // namespace

std::shared_ptr<GateImpl> make_gate(const GateOptions& options, int64_t embed_dim,
                                    int64_t num_heads, const at::TensorOptions& tensor_options) {
  return std::visit(
      [&]<typename Options>(const Options& typed) -> std::shared_ptr<GateImpl> {
        return std::make_shared<typename ModuleOf<Options>::type>(typed, embed_dim, num_heads,
                                                                  tensor_options);
      },
      options);
}

namespace {

// The gates of type G in `model`, itself among them. (modules() with the model itself would need it
// to be owned by a shared pointer.)
template <typename G>
std::vector<G*> find_gates(const torch::nn::Module& model) {
  std::vector<G*> found;
  if (auto* gate = dynamic_cast<G*>(const_cast<torch::nn::Module*>(&model))) {
    found.push_back(gate);
  }
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto* gate = dynamic_cast<G*>(module.get())) {
      found.push_back(gate);
    }
  }
  return found;
}

}  // namespace

std::vector<GateImpl*> gates_in(const torch::nn::Module& model) {
  return find_gates<GateImpl>(model);
}

std::shared_ptr<GateImpl> make_inner_gate(const GateOptionsBox& options, int64_t embed_dim,
                                          int64_t num_heads,
                                          const at::TensorOptions& tensor_options) {
  const GateOptions& own = options.get()->options;
  TORCH_CHECK_VALUE(!std::holds_alternative<GroupGateOptions>(own),
                    "GroupGate must be a layer's gate itself, not inside another gate: a layer "
                    "knows its groups");
  auto gate = make_gate(own, embed_dim, num_heads, tensor_options);
  TORCH_CHECK_VALUE(!gate->reads_heads(),
                    "gate must choose by the layer's input, and this one reads queries and keys");
  return gate;
}

at::Tensor penalty_of(const std::vector<GateImpl*>& gates) {
  std::vector<TargetTerm> terms;
  std::vector<at::Tensor> others;
  for (const auto* gate : gates) {
    const auto* targeted = dynamic_cast<const TargetedGateImpl*>(gate);
    if (targeted == nullptr) {
      if (auto own = gate->penalty(); own.defined()) others.push_back(std::move(own));
    } else if (gate->expected_heads.defined()) {
      const auto& t = targeted->target();
      terms.push_back({gate->expected_heads, gate->num_heads(), t.type, t.scope == "model",
                       targeted->progress, t.keep, t.initial_keep, t.warmup, t.strength, t.form,
                       optional(targeted->multipliers_or_undefined()),
                       optional(targeted->regulariser)});
    }
  }
  return gates_penalty(terms, others);
}

at::Tensor penalty(const torch::nn::Module& model) { return penalty_of(gates_in(model)); }

void anneal(torch::nn::Module& model, double progress) {
  TORCH_CHECK_VALUE(progress >= 0.0 && progress <= 1.0, "progress must be between 0 and 1, got ",
                    progress);
  for (auto* gate : gates_in(model)) {
    gate->anneal(progress);
  }
}

void link_gates(const std::vector<GateImpl*>& gates) {
  std::map<std::string, std::vector<GateImpl*>> alike;
  for (auto* gate : gates) {
    if (const auto key = gate->scope_key(); !key.empty()) {
      alike[key].push_back(gate);
    }
  }
  for (const auto& [key, members] : alike) {
    const auto scope = std::make_shared<GateScope>();
    for (const auto* gate : members) {
      gate->contribute(*scope);
    }
    for (size_t i = 0; i < members.size(); ++i) {
      members[i]->join(scope, static_cast<int64_t>(i));
    }
  }
}

void link_gates(torch::nn::Module& model) { link_gates(gates_in(model)); }

void request_budget(torch::nn::Module& model, const at::Tensor& budget) {
  const auto gates = find_gates<RequestedBudgetGateImpl>(model);
  TORCH_CHECK_VALUE(!gates.empty(), "model must have a RequestedBudgetGate");
  for (auto* gate : gates) {
    gate->request(budget);
  }
}

void request_budget(torch::nn::Module& model, double budget) {
  request_budget(model, torch::full({}, budget, at::kDouble));
}

void start_gates(torch::nn::Module& model, const std::map<std::string, at::Tensor>& importance,
                 double keep, double sharpness) {
  std::vector<GateImpl*> gates;
  std::vector<std::string> layers;
  std::vector<int64_t> heads;
  std::vector<at::Tensor> scores;
  std::string outer;  // it starts the gates inside it
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    auto* gate = dynamic_cast<GateImpl*>(item.value().get());
    if (gate == nullptr || !gate->starts() ||
        (!outer.empty() && item.key().starts_with(outer + "."))) {
      continue;
    }
    outer = item.key();
    std::string name = item.key();
    if (name == "gate") {
      name.clear();
    } else if (name.ends_with(".gate")) {
      name.resize(name.size() - 5);
    }
    const auto score = importance.find(name);
    TORCH_CHECK_VALUE(score != importance.end(), "importance must have a score for ",
                      layer_called(name));
    gates.push_back(gate);
    layers.push_back(name);
    heads.push_back(gate->num_heads());
    scores.push_back(score->second);
  }
  const auto [relevance, shares] = gate_starts(scores, layers, heads, keep, sharpness);
  for (size_t i = 0; i < gates.size(); ++i) {
    if (heads[i] > 0) gates[i]->start_from(relevance[i], shares[i]);
  }
}

}  // namespace headwise

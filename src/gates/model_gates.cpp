// What is done with all the gates of a model.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <map>

#include "gates/budget.h"
#include "gates/checks.h"
#include "gates/hard_concrete.h"
#include "gates/model_gates.h"
#include "gates/options.h"
#include "gates/scope.h"

namespace headwise {

std::shared_ptr<GateImpl> make_gate(const GateOptions& options, int64_t embed_dim,
                                    int64_t num_heads, const at::TensorOptions& tensor_options) {
  return std::visit(
      [&]<typename Options>(const Options& typed) -> std::shared_ptr<GateImpl> {
        return std::make_shared<typename GateFields<Options>::Gate>(typed, embed_dim, num_heads,
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

at::Tensor penalty(const torch::nn::Module& model) {
  std::vector<std::vector<const TargetedGateImpl*>> pools;
  std::vector<at::Tensor> own, terms;
  for (const auto* gate : find_gates<TargetedGateImpl>(model)) {
    if (!gate->expected_heads.defined()) {
      continue;
    }
    if (gate->target().scope == "layer") {
      own.push_back(gate->penalty());
      continue;
    }
    const auto pool = std::find_if(pools.begin(), pools.end(), [&](const auto& members) {
      return members.front()->target() == gate->target();
    });
    (pool == pools.end() ? pools.emplace_back() : *pool).push_back(gate);
    if (gate->regulariser.defined()) {
      own.push_back(gate->regulariser);
    }
  }
  for (const auto& pool : pools) {
    std::vector<at::Tensor> expected;
    std::vector<int64_t> heads;
    for (const auto* gate : pool) {
      expected.push_back(gate->expected_heads);
      heads.push_back(gate->num_heads());
    }
    const auto* first = pool.front();
    const auto& target = first->target();
    terms.push_back(target_penalty(expected, heads, first->progress, target.target, target.initial,
                                   target.warmup, target.strength, target.form,
                                   optional(first->multipliers_or_undefined())));
  }
  if (!own.empty()) {
    terms.push_back(at::stack(own).mean());
  }
  return terms.empty() ? at::zeros({}) : at::stack(terms).sum();
}

void anneal(torch::nn::Module& model, double progress) {
  TORCH_CHECK_VALUE(progress >= 0.0 && progress <= 1.0, "progress must be between 0 and 1, got ",
                    progress);
  for (auto* gate : find_gates<GateImpl>(model)) {
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

void link_gates(torch::nn::Module& model) { link_gates(find_gates<GateImpl>(model)); }

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
  check_fraction("keep", keep);
  std::vector<GateImpl*> gates;
  std::vector<at::Tensor> scores;
  std::vector<int64_t> sizes;
  std::string outer;  // the gate that the ones inside it are started by
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
    TORCH_CHECK_VALUE(score != importance.end(), "importance must have a score for layer '", name,
                      "'");
    TORCH_CHECK_VALUE(score->second.sizes() == at::IntArrayRef({gate->num_heads()}),
                      "importance of layer '", name, "' must have ", gate->num_heads(),
                      " heads, got ", score->second.sizes());
    TORCH_CHECK_VALUE(at::isfinite(score->second).all().item<bool>(), "importance of layer '", name,
                      "' must be finite, got NaN or infinity");
    gates.push_back(gate);
    scores.push_back(score->second.to(at::kCPU, at::kDouble));
    sizes.push_back(gate->num_heads());
  }
  if (gates.empty()) {
    return;
  }
  const auto parts =
      importance_start(at::cat(scores), keep, sharpness).split_with_sizes(sizes);  // [H] each
  for (size_t i = 0; i < gates.size(); ++i) {
    if (sizes[i] > 0) {
      gates[i]->start_from(parts[i], parts[i].gt(0).to(at::kDouble).mean().item<double>());
    }
  }
}

}  // namespace headwise

// Pruning of a whole layer; plan.cpp works on tensors alone, without torch::nn.
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "headwise/gates.h"
#include "headwise/grouped_query_attention.h"
#include "headwise/multihead_attention.h"
#include "headwise/pruning.h"
#include "shown.h"

namespace headwise {
namespace {

/// Whether the gate chooses the same heads for every input.
bool is_static(const GateImpl& gate) {
  if (const auto* groups = dynamic_cast<const GroupGateImpl*>(&gate)) {
    return is_static(*groups->gate);
  }
  if (dynamic_cast<const FixedGateImpl*>(&gate) != nullptr ||
      dynamic_cast<const SubsetGateImpl*>(&gate) != nullptr ||
      dynamic_cast<const SleepGateImpl*>(&gate) != nullptr) {
    return true;
  }
  const auto* hard_concrete = dynamic_cast<const HardConcreteGateImpl*>(&gate);
  return hard_concrete != nullptr && !hard_concrete->options.input_dependent();
}

LayerPlan plan_of(const std::shared_ptr<GateImpl>& own, const std::string& name,
                  const at::Tensor& like) {
  TORCH_CHECK_VALUE(own, layer_called(name), " must have a gate to make a plan from");
  GateImpl& gate = *own;
  TORCH_CHECK_VALUE(is_static(gate), layer_called(name),
                    " has a gate whose choice depends on the input: no plan is equivalent to it");
  const c10::NoGradGuard no_grad;
  const bool training = gate.is_training();
  gate.eval();
  // Any input will do: the choice is the same.
  const at::Tensor any = at::zeros({1, 1, gate.embed_dim()}, like.options());
  const at::Tensor weight = gate.forward(any).weight.to(at::kCPU, at::kDouble).contiguous();
  gate.train(training);
  LayerPlan plan{name, gate.num_heads(), {}, {}};
  for (int64_t head = 0; head < gate.num_heads(); ++head) {
    const double scale = weight.const_data_ptr<double>()[head];
    if (scale == 0) continue;
    plan.heads.push_back(head);
    plan.scale.push_back(scale);
  }
  return plan;
}

void check_prunable(int64_t num_heads, const std::shared_ptr<GateImpl>& gate,
                    const LayerPlan& plan) {
  TORCH_CHECK_VALUE(plan.num_heads == num_heads, "plan has ", plan.num_heads, " heads for ",
                    layer_called(plan.name), ", which has ", num_heads);
  TORCH_CHECK_VALUE(!gate || is_static(*gate), layer_called(plan.name),
                    " has a gate that chooses for each input, among the heads it was trained with: "
                    "build the layer without it first");
}

/// Gives `to` what `from` holds, and whether it is trained.
void take_over(const at::Tensor& to, const at::Tensor& values, const at::Tensor& from) {
  const c10::NoGradGuard no_grad;
  to.copy_(values);
  to.set_requires_grad(from.requires_grad());
}

}  // namespace

LayerPlan plan_from_gate(const MultiheadAttention& layer, const std::string& name) {
  return plan_of(layer->gate, name, layer->out_proj->weight);
}

LayerPlan plan_from_gate(const GroupedQueryAttention& layer, const std::string& name) {
  return plan_of(layer->gate, name, layer->o_proj->weight);
}

MultiheadAttention prune(const MultiheadAttention& layer, const LayerPlan& plan) {
  check_prunable(layer->options.num_heads(), layer->gate, plan);
  NamedTensors parameters;
  for (const auto& item : layer->named_parameters()) {
    if (!item.key().starts_with("gate.")) parameters[item.key()] = item.value();
  }
  const NamedTensors kept = prune_projections(parameters, plan);

  auto options = layer->options;
  options.num_heads(static_cast<int64_t>(plan.heads.size()))
      .head_dim(layer->head_dim())
      .gate(std::nullopt)
      .device(layer->out_proj->weight.device())
      .dtype(layer->out_proj->weight.scalar_type());
  MultiheadAttention smaller(options);
  for (auto& item : smaller->named_parameters()) {
    take_over(item.value(), kept.at(item.key()), parameters.at(item.key()));
  }
  smaller->train(layer->is_training());
  return smaller;
}

GroupedQueryAttention prune(const GroupedQueryAttention& layer, const LayerPlan& plan) {
  check_prunable(layer->options.num_heads(), layer->gate, plan);
  // The output projection first: it checks the plan.
  const auto output =
      prune_projections({{"out_proj.weight", layer->o_proj->weight}}, plan).at("out_proj.weight");
  const auto groups = layer->head_groups();
  LayerPlan shared{plan.name, layer->num_key_value_heads(), {}, {}};
  std::vector<int64_t> key_value_heads;
  for (const auto head : plan.heads) {
    if (shared.heads.empty() || shared.heads.back() != groups[head]) {
      shared.heads.push_back(groups[head]);
      shared.scale.push_back(1.0);
    }
    key_value_heads.push_back(static_cast<int64_t>(shared.heads.size()) - 1);
  }
  auto options = layer->options;
  options.num_heads(static_cast<int64_t>(plan.heads.size()))
      .num_key_value_heads(static_cast<int64_t>(shared.heads.size()))
      .key_value_heads(std::move(key_value_heads))
      .head_dim(layer->head_dim())
      .scale(layer->scale())
      .gate(std::nullopt)
      .device(layer->o_proj->weight.device())
      .dtype(layer->o_proj->weight.scalar_type());
  GroupedQueryAttention smaller(options);
  for (const auto& item : smaller->named_children()) {  // a loaded projection may have no bias
    const auto* made = item.value()->as<torch::nn::Linear>();
    if (made == nullptr || !made->bias.defined()) continue;
    const auto old = layer->named_children()[item.key()];
    if (!old->as<torch::nn::Linear>()->bias.defined()) smaller->drop_bias(item.key());
  }
  for (const auto& item : smaller->named_parameters()) {
    const auto& name = item.key();
    const auto old = layer->named_parameters()[name];
    const bool of_queries = name.starts_with("q_proj.");
    at::Tensor kept = old;
    if (name == "o_proj.weight") {
      kept = output;
    } else if (of_queries || name.starts_with("k_proj.") || name.starts_with("v_proj.")) {
      const auto rows = old.dim() == 2 ? old : old.unsqueeze(1);
      kept = prune_projections({{"q_proj_weight", rows}}, of_queries ? plan : shared)
                 .at("q_proj_weight")
                 .reshape(item.value().sizes());
    }
    take_over(item.value(), kept, old);
  }
  smaller->train(layer->is_training());
  return smaller;
}

}  // namespace headwise

// Pruning of a whole layer; plan.cpp works on tensors alone, without torch::nn.
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "headwise/gates.h"
#include "headwise/multihead_attention.h"
#include "headwise/pruning.h"

namespace headwise {
namespace {

/// Whether the gate chooses the same heads for every input.
bool is_static(const GateImpl& gate) {
  if (dynamic_cast<const FixedGateImpl*>(&gate) != nullptr ||
      dynamic_cast<const SubsetGateImpl*>(&gate) != nullptr ||
      dynamic_cast<const SleepGateImpl*>(&gate) != nullptr) {
    return true;
  }
  const auto* hard_concrete = dynamic_cast<const HardConcreteGateImpl*>(&gate);
  return hard_concrete != nullptr && !hard_concrete->options.input_dependent();
}

}  // namespace

LayerPlan plan_from_gate(const MultiheadAttention& layer, const std::string& name) {
  TORCH_CHECK_VALUE(layer->gate, "layer '", name, "' must have a gate to make a plan from");
  GateImpl& gate = *layer->gate;
  TORCH_CHECK_VALUE(is_static(gate), "layer '", name, "' has a gate whose choice depends on the ",
                    "input: no plan is equivalent to it");
  const c10::NoGradGuard no_grad;
  const bool training = gate.is_training();
  gate.eval();
  // Any input will do: the choice is the same.
  const at::Tensor any = at::zeros({1, 1, gate.embed_dim()}, layer->out_proj->weight.options());
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

MultiheadAttention prune(const MultiheadAttention& layer, const LayerPlan& plan) {
  TORCH_CHECK_VALUE(plan.num_heads == layer->options.num_heads(), "plan has ", plan.num_heads,
                    " heads for layer '", plan.name, "', which has ", layer->options.num_heads());
  TORCH_CHECK_VALUE(!layer->gate || is_static(*layer->gate), "layer '", plan.name,
                    "' has a gate that chooses for each input, among the "
                    "heads it was trained with: build the layer without it first");
  NamedTensors parameters;
  for (const auto& item : layer->named_parameters()) {
    if (item.key().rfind("gate.", 0) != 0) parameters[item.key()] = item.value();
  }
  const NamedTensors kept = prune_projections(parameters, plan);

  auto options = layer->options;
  options.num_heads(static_cast<int64_t>(plan.heads.size()))
      .head_dim(layer->head_dim())
      .gate(std::nullopt)
      .device(layer->out_proj->weight.device())
      .dtype(layer->out_proj->weight.scalar_type());
  MultiheadAttention smaller(options);
  const c10::NoGradGuard no_grad;
  for (auto& item : smaller->named_parameters()) {
    item.value().copy_(kept.at(item.key()));
    item.value().set_requires_grad(parameters.at(item.key()).requires_grad());
  }
  smaller->train(layer->is_training());
  return smaller;
}

}  // namespace headwise

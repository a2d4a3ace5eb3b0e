// Pruning of a whole layer; pruning.cpp, which knows only tensors, does without torch::nn.
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "headwise/gates.h"
#include "headwise/multihead_attention.h"
#include "headwise/pruning.h"

namespace headwise {

MultiheadAttention prune(const MultiheadAttention& layer, const LayerPlan& plan) {
  TORCH_CHECK_VALUE(plan.num_heads == layer->options.num_heads(), "plan has ", plan.num_heads,
                    " heads for layer '", plan.name, "', which has ", layer->options.num_heads());
  TORCH_CHECK_VALUE(!layer->gate || dynamic_cast<FixedGateImpl*>(layer->gate.get()) != nullptr,
                    "layer '", plan.name,
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

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "headwise/structure.h"
#include "structure/units.h"

namespace headwise {

NamedTensors prune_attention(const NamedTensors& parameters, const LayerPlan& layer,
                             double block_scale) {
  LayerPlan scaled = layer;
  for (double& scale : scaled.scale) scale *= block_scale;
  if (block_scale == 0.0) {
    scaled.heads.clear();
    scaled.scale.clear();
  }
  NamedTensors pruned = prune_projections(parameters, scaled);
  if (block_scale == 0.0) {
    for (const char* bias : {"in_proj_bias", "bias_k", "bias_v", "out_proj.bias"}) {
      pruned.erase(bias);
    }
  } else if (const auto bias = pruned.find("out_proj.bias"); bias != pruned.end()) {
    const c10::NoGradGuard no_grad;
    bias->second = bias->second * block_scale;
  }
  return pruned;
}

NamedTensors prune_ffn(const NamedTensors& parameters, const FfnPlan& plan, double block_scale) {
  const std::string what = "plan of feed-forward network '" + plan.name + "'";
  check_units(plan.neurons, plan.scale, plan.num_neurons, "neurons", what);
  const bool gone = block_scale == 0.0;
  const std::vector<int64_t> neurons = gone ? std::vector<int64_t>{} : plan.neurons;
  std::vector<double> scale = gone ? std::vector<double>{} : plan.scale;
  for (double& value : scale) value *= block_scale;
  const c10::NoGradGuard no_grad;
  const auto take = [&](const std::string& name, const at::Tensor& parameter, int64_t dim,
                        const std::vector<double>* factor) {
    TORCH_CHECK_VALUE(
        parameter.defined() && parameter.dim() > dim && parameter.size(dim) == plan.num_neurons,
        name, " must have size ", plan.num_neurons, " in dimension ", dim, ", as the ", what,
        " says, got shape ", parameter.sizes());
    return take_units(parameter, dim, neurons, factor);
  };
  NamedTensors pruned;
  for (const auto& [name, parameter] : parameters) {
    if (name == "linear1.weight" || name == "linear1.bias") {
      pruned[name] = take(name, parameter, 0, nullptr);
    } else if (name == "linear2.weight") {
      pruned[name] = take(name, parameter, 1, &scale);
    } else if (name == "linear2.bias") {
      if (!gone) pruned[name] = parameter * block_scale;
    } else {
      TORCH_CHECK_VALUE(false, "parameters must be those of a feed-forward network, got '", name,
                        "'");
    }
  }
  return pruned;
}

at::Tensor prune_hidden(const at::Tensor& parameter, int64_t dim, const HiddenPlan& plan,
                        bool scaled) {
  check_units(plan.dimensions, plan.scale, plan.size, "dimensions",
              "plan of the hidden dimensions");
  TORCH_CHECK_VALUE(dim >= 0 && dim < parameter.dim() && parameter.size(dim) == plan.size,
                    "parameter must have size ", plan.size, " in dimension ", dim,
                    ", as the plan of the hidden dimensions says, got shape ", parameter.sizes());
  const c10::NoGradGuard no_grad;
  return take_units(parameter, dim, plan.dimensions, scaled ? &plan.scale : nullptr);
}

at::Tensor masked_layer_norm(const at::Tensor& x, const at::Tensor& mask,
                             const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, double eps, bool scaled) {
  TORCH_CHECK_VALUE(x.dim() > 0 && mask.dim() == 1 && mask.size(0) == x.size(-1),
                    "mask must have shape [", x.dim() > 0 ? x.size(-1) : 0, "], got ",
                    mask.sizes());
  const auto compute = at::promote_types(x.scalar_type(), at::kFloat);
  const at::Tensor values = x.to(compute), factor = mask.to(compute);
  const at::Tensor kept = factor.detach().ne(0).to(compute);                    // [D]
  const at::Tensor count = kept.sum().clamp_min(1.0);                           // []
  const at::Tensor mean = (values * kept).sum({-1}, /*keepdim=*/true) / count;  // [..., 1]
  const at::Tensor centred = (values - mean) * kept;                            // [..., D]
  const at::Tensor variance = centred.square().sum({-1}, true) / count;         // [..., 1]
  at::Tensor y = centred * at::rsqrt(variance + eps);
  if (weight) y = y * *weight;
  if (bias) y = y + *bias * kept;
  return (scaled ? y * factor : y).to(x.scalar_type());
}

double head_macs(double tokens, int64_t width, int64_t head_dim) {
  const auto d = static_cast<double>(head_dim);
  return 4.0 * tokens * static_cast<double>(width) * d + 2.0 * tokens * tokens * d;
}

double neuron_macs(double tokens, int64_t width) {
  return 2.0 * tokens * static_cast<double>(width);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("masked_layer_norm", masked_layer_norm);
}

}  // namespace headwise

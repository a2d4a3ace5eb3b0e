// The budget gate of an evaluated layer as one operator, and the relevance that other gates share
// with it: if no gradient is needed, a kernel that reads the input once; otherwise the two dozen
// operators it consists of.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/attention_ops.h"
#include "ops/budget_gate.h"
#include "ops/gates/budget.h"
#include "shown.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/budget_gate.h"
#endif

namespace headwise {
namespace {

using at::Tensor;
using ops::GateResult;

GateResult composed(HEADWISE_BUDGET_GATE_PARAMETERS) {
  const auto features = standardize(gate_features(x, key_padding_mask), mean, variance);  // [B, D]
  const auto relevance = input_relevance(features, base, relevance_weight, progress, false, 0.0);
  const auto budgets =
      hidden_weight ? std::get<0>(head_budget(features, *hidden_weight, *hidden_bias, *out_weight,
                                              *out_bias, progress, false, min_budget, max_budget,
                                              keep, initial_keep, warmup, 0.0))
                    : at::full_symint({x.sym_size(0)}, budget, features.options());  // [B]
  const auto [index, count, weight, expected] =
      budget_select(relevance, budgets, progress, {}, false, false, 1.0, 1.0, 0.0, 0.0, false,
                    false, min_heads, rounding);
  return {index, count, weight.to(x.scalar_type()), relevance, budgets};
}

bool wants_gradient(at::TensorList tensors) {
  for (const auto& t : tensors)
    if ((at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(/*level=*/0).defined())
      return true;
  return false;
}

/// The parameters, those of the network only if there is one.
std::vector<Tensor> parameters(HEADWISE_BUDGET_GATE_PARAMETERS) {
  std::vector<Tensor> all{base, relevance_weight};
  if (hidden_weight) all.insert(all.end(), {*hidden_weight, *hidden_bias, *out_weight, *out_bias});
  return all;
}

bool is_fused(HEADWISE_BUDGET_GATE_PARAMETERS) {
  return ops::takes_budget_gate(HEADWISE_BUDGET_GATE_ARGUMENTS) &&
         !wants_gradient(parameters(HEADWISE_BUDGET_GATE_ARGUMENTS));
}

GateResult fused(HEADWISE_BUDGET_GATE_PARAMETERS) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("headwise::_budget_gate", "")
                                 .typed<GateResult(HEADWISE_BUDGET_GATE_PARAMETERS)>();
  return kernel.call(HEADWISE_BUDGET_GATE_ARGUMENTS);
}

}  // namespace

// Arguments that do not fit together are left to the operators, which raise the error.
bool ops::takes_budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS) {
  const auto type = x.scalar_type(), parameter_type = base.scalar_type();
  if (x.layout() != at::kStrided || x.dim() != 3 || base.dim() != 1 || !at::isFloatingType(type) ||
      !at::isFloatingType(parameter_type) || ops::lse_type(type) != ops::lse_type(parameter_type))
    return false;
  const bool network = hidden_weight.has_value();
  for (const auto* t : {&hidden_bias, &out_weight, &out_bias})
    if (t->has_value() != network) return false;
  const auto all = parameters(HEADWISE_BUDGET_GATE_ARGUMENTS);
  for (const auto& t : all)
    if (t.scalar_type() != parameter_type || t.device() != x.device()) return false;
  for (const auto* t : {&mean, &variance, &progress})
    if (!at::isFloatingType(t->scalar_type()) || t->device() != x.device()) return false;
  const auto heads = base.sym_size(0), width = x.sym_size(2);
  const auto shaped = [](const Tensor& t, c10::SymIntArrayRef sizes) {
    return t.sym_sizes() == sizes;
  };
  if (width == 0 || !shaped(relevance_weight, {heads, width}) || !shaped(mean, {width}) ||
      !shaped(variance, {width}) || progress.sym_numel() != 1)
    return false;
  if (hidden_weight) {
    if (hidden_weight->dim() != 2) return false;
    const auto hidden = hidden_weight->sym_size(0);
    if (!shaped(*hidden_weight, {hidden, width}) || !shaped(*hidden_bias, {hidden}) ||
        !shaped(*out_weight, {1, hidden}) || !shaped(*out_bias, {1}))
      return false;
  }
  if (key_padding_mask) {
    const auto& mask = *key_padding_mask;
    if (mask.device() != x.device() || !shaped(mask, {x.sym_size(0), x.sym_size(1)}) ||
        !(mask.scalar_type() == at::kBool || at::isFloatingType(mask.scalar_type())))
      return false;
  }
  if (x.is_cpu()) return true;
#ifdef HEADWISE_CUDA
  if (x.is_cuda()) return ops::device::takes_budget_gate(HEADWISE_BUDGET_GATE_ARGUMENTS);
#endif
  return false;
}

at::Tensor evaluate_relevance(const Tensor& x, const std::optional<Tensor>& key_padding_mask,
                              const Tensor& mean, const Tensor& variance, const Tensor& base,
                              const Tensor& weight, const Tensor& progress) {
  // A budget gate all of whose heads run, for its relevance.
  const std::optional<Tensor> none;
  const auto one = [&](auto&& use) {
    return use(x, key_padding_mask, mean, variance, base, weight, none, none, none, none, progress,
               1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0, "round");
  };
  if (one(is_fused)) return std::get<3>(one(fused));
  return input_relevance(standardize(gate_features(x, key_padding_mask), mean, variance), base,
                         weight, progress, false, 0.0);
}

GateResult evaluate_budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS) {
  TORCH_CHECK_VALUE(hidden_weight.has_value() == hidden_bias.has_value() &&
                        hidden_weight.has_value() == out_weight.has_value() &&
                        hidden_weight.has_value() == out_bias.has_value(),
                    "hidden_weight, hidden_bias, out_weight and out_bias must be given together");
  TORCH_CHECK_VALUE(rounding == "round" || rounding == "ceil",
                    "rounding must be round or ceil, got ", shown(rounding));
  TORCH_CHECK_VALUE(min_heads >= 0, "min_heads must not be negative, got ", min_heads);
  return is_fused(HEADWISE_BUDGET_GATE_ARGUMENTS) ? fused(HEADWISE_BUDGET_GATE_ARGUMENTS)
                                                  : composed(HEADWISE_BUDGET_GATE_ARGUMENTS);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("evaluate_budget_gate", evaluate_budget_gate);
  m.impl("evaluate_relevance", evaluate_relevance);
}
// Its results carry no gradient, though x may.
TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("_budget_gate", torch::CppFunction::makeFallthrough());
}

}  // namespace headwise

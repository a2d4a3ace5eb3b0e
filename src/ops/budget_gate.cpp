// The budget gate of an evaluated layer as one operator, and the relevance that other gates have in
// common with it: where no gradient is wanted, a kernel that reads the input once; elsewhere the
// two dozen operators it consists of.
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

/// The parameters, those of the network only where there is one.
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

// What does not fit together is left to the operators, which say so.
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
  // A budget gate all of whose heads run: its relevance is what is wanted.
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

namespace {

// Shapes and dtypes, for tracing.
GateResult traced(HEADWISE_BUDGET_GATE_PARAMETERS) {
  const auto batch = x.sym_size(0), heads = base.sym_size(0);
  const auto whole = x.options().dtype(at::kInt);
  const auto sums = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_symint({batch, heads}, whole), at::empty_symint({batch}, whole),
          at::empty_symint({batch, heads}, x.options()), at::empty_symint({batch, heads}, sums),
          at::empty_symint({batch}, sums)};
}

constexpr const char* kArguments =
    "(Tensor x, Tensor? key_padding_mask, Tensor mean, Tensor variance, Tensor base, "
    "Tensor relevance_weight, Tensor? hidden_weight, Tensor? hidden_bias, Tensor? out_weight, "
    "Tensor? out_bias, Tensor progress, float budget, float min_budget, float max_budget, "
    "float keep, float initial_keep, float warmup, int min_heads, str rounding) -> "
    "(Tensor index, Tensor count, Tensor weight, Tensor relevance, Tensor budget)";

}  // namespace

TORCH_LIBRARY_FRAGMENT(headwise, m) {
  // x [B, L, D], mean and variance [D], base [H], relevance_weight [H, D], hidden_weight [h, D],
  // hidden_bias [h], out_weight [1, h], out_bias [1] -> index, count, weight, relevance [B, H] and
  // budget [B] of a BudgetGate in evaluation with weights of one. Without the four of the network
  // every sequence has `budget`.
  m.def((std::string("evaluate_budget_gate") + kArguments).c_str(), evaluate_budget_gate);
  m.def((std::string("_budget_gate") + kArguments).c_str());
  m.def(
      "evaluate_relevance(Tensor x, Tensor? key_padding_mask, Tensor mean, Tensor variance, "
      "Tensor base, Tensor weight, Tensor progress) -> Tensor",
      evaluate_relevance);
}

TORCH_LIBRARY_IMPL(headwise, Meta, m) { m.impl("_budget_gate", traced); }
// Its results carry no gradient, though x may.
TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("_budget_gate", torch::CppFunction::makeFallthrough());
}
#ifdef HEADWISE_CUDA
TORCH_LIBRARY_IMPL(headwise, CUDA, m) { m.impl("_budget_gate", ops::device::budget_gate); }
#endif

}  // namespace headwise

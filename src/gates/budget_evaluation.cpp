// The budget gate of an evaluated layer as one operator: where CUDA kernels were compiled and no
// gradient is wanted, two launches instead of two dozen; elsewhere the operators it consists of.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "gates/budget.h"
#include "ops/cuda/budget_gate.h"

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
                                              target, initial_budget, warmup, 0.0))
                    : at::full_symint({x.sym_size(0)}, budget, features.options());  // [B]
  const auto [index, count, weight, expected] =
      budget_select(relevance, budgets, progress, {}, false, false, 1.0, 1.0, 0.0, 0.0, false,
                    false, min_heads, rounding);
  return {index, count, weight.to(x.scalar_type()), relevance, budgets};
}

#ifdef HEADWISE_CUDA
bool wants_gradient(const std::initializer_list<const Tensor*>& tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const auto* t : tensors)
    if (t->requires_grad()) return true;
  return false;
}
#endif

}  // namespace

GateResult evaluate_budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS) {
  TORCH_CHECK_VALUE(hidden_weight.has_value() == hidden_bias.has_value() &&
                        hidden_weight.has_value() == out_weight.has_value() &&
                        hidden_weight.has_value() == out_bias.has_value(),
                    "hidden_weight, hidden_bias, out_weight and out_bias must be given together");
#ifdef HEADWISE_CUDA
  const auto& other = hidden_weight ? *hidden_weight : base;
  if (x.is_cuda() && !x.is_meta() && !wants_gradient({&base, &relevance_weight, &other}) &&
      ops::device::takes_budget_gate(HEADWISE_BUDGET_GATE_ARGUMENTS)) {
    static const auto fused = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("headwise::_budget_gate", "")
                                  .typed<GateResult(HEADWISE_BUDGET_GATE_PARAMETERS)>();
    return fused.call(HEADWISE_BUDGET_GATE_ARGUMENTS);
  }
#endif
  return composed(HEADWISE_BUDGET_GATE_ARGUMENTS);
}

namespace {

#ifdef HEADWISE_CUDA
// Shapes and dtypes, for tracing.
GateResult traced(HEADWISE_BUDGET_GATE_PARAMETERS) {
  const auto batch = x.sym_size(0), heads = base.sym_size(0);
  const auto whole = x.options().dtype(at::kInt);
  const auto sums = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_symint({batch, heads}, whole), at::empty_symint({batch}, whole),
          at::empty_symint({batch, heads}, x.options()), at::empty_symint({batch, heads}, sums),
          at::empty_symint({batch}, sums)};
}
#endif

constexpr const char* kArguments =
    "(Tensor x, Tensor? key_padding_mask, Tensor mean, Tensor variance, Tensor base, "
    "Tensor relevance_weight, Tensor? hidden_weight, Tensor? hidden_bias, Tensor? out_weight, "
    "Tensor? out_bias, Tensor progress, float budget, float min_budget, float max_budget, "
    "float target, float initial_budget, float warmup, int min_heads, str rounding) -> "
    "(Tensor index, Tensor count, Tensor weight, Tensor relevance, Tensor budget)";

}  // namespace

TORCH_LIBRARY_FRAGMENT(headwise, m) {
  // x [B, L, D], mean and variance [D], base [H], relevance_weight [H, D], hidden_weight [h, D],
  // hidden_bias [h], out_weight [1, h], out_bias [1] -> index, count, weight, relevance [B, H] and
  // budget [B] of a BudgetGate in evaluation with weights of one. Without the four of the network
  // every sequence has `budget`.
  m.def((std::string("evaluate_budget_gate") + kArguments).c_str(), evaluate_budget_gate);
#ifdef HEADWISE_CUDA
  m.def((std::string("_budget_gate") + kArguments).c_str());
#endif
}

#ifdef HEADWISE_CUDA
TORCH_LIBRARY_IMPL(headwise, CUDA, m) { m.impl("_budget_gate", ops::device::budget_gate); }
TORCH_LIBRARY_IMPL(headwise, Meta, m) { m.impl("_budget_gate", traced); }
#endif

}  // namespace headwise

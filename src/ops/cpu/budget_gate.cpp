// The CPU kernel of headwise::_budget_gate: tensors in, raw pointers to src/kernels/cpu.
#include "ops/budget_gate.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "headwise/selection.h"
#include "kernels/cpu/budget_gate.h"
#include "ops/cpu/pooled_input.h"
#include "ops/gates/schedule.h"

namespace headwise::ops {
namespace {

using at::Tensor;

#define HEADWISE_DISPATCH(type, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "_budget_gate", __VA_ARGS__)
// The types whose sums are float.
#define HEADWISE_DISPATCH_NARROW(type, ...)                                      \
  AT_DISPATCH_SWITCH(type, "_budget_gate",                                       \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

/// The elements in the type of the sums.
template <typename C>
std::vector<C> widened(const Tensor& t) {
  const auto values = t.contiguous();
  std::vector<C> wide(values.numel());
  HEADWISE_DISPATCH(values.scalar_type(), [&] {
    std::copy_n(values.const_data_ptr<scalar_t>(), wide.size(), wide.begin());
  });
  return wide;
}

/// Contiguous parameters, kept so that pointers into them stay valid.
struct Parameters {
  std::vector<Tensor> kept;
  template <typename P>
  const P* pointer(const Tensor& t) {
    kept.push_back(t.contiguous());
    return kept.back().const_data_ptr<P>();
  }
};

template <typename T, typename P>
GateResult run(HEADWISE_BUDGET_GATE_PARAMETERS) {
  using Gate = kernels::BudgetGate<T, P>;
  using C = typename Gate::C;
  const auto sums = x.options().dtype(c10::CppTypeToScalarType<C>::value);
  const auto whole = x.options().dtype(at::kInt);
  Gate g{};
  std::vector<Tensor> kept;
  kept.reserve(2);
  read_input<T>(g, x, key_padding_mask, kept);
  g.heads = base.size(0);
  auto index = at::empty({g.batch, g.heads}, whole), count = at::empty({g.batch}, whole);
  auto weight = at::empty({g.batch, g.heads}, x.options());
  auto relevance = at::empty({g.batch, g.heads}, sums), budgets = at::empty({g.batch}, sums);
  const auto means = widened<C>(mean), variances = widened<C>(variance);
  g.mean = means.data(), g.variance = variances.data();
  Parameters parameters;
  parameters.kept.reserve(6);
  g.base = parameters.pointer<P>(base);
  g.relevance_weight = parameters.pointer<P>(relevance_weight);
  if (hidden_weight) {
    g.hidden = hidden_weight->size(0);
    g.hidden_weight = parameters.pointer<P>(*hidden_weight);
    g.hidden_bias = parameters.pointer<P>(*hidden_bias);
    g.out_weight = parameters.pointer<P>(*out_weight);
    g.out_bias = parameters.pointer<P>(*out_bias);
  }
  g.fixed_budget = budget, g.min_budget = min_budget, g.max_budget = max_budget;
  g.progress = widened<double>(progress)[0];
  g.warmup = warmup, g.start_logit = warmup_start(initial_keep, keep);
  g.min_heads = min_heads, g.round_up = rounding == "ceil";
  g.index = index.template mutable_data_ptr<int32_t>();
  g.count = count.template mutable_data_ptr<int32_t>();
  g.weight = weight.template mutable_data_ptr<T>();
  g.relevance = relevance.template mutable_data_ptr<C>();
  g.budget = budgets.template mutable_data_ptr<C>();
  kernels::budget_gate(g);

  const auto finite = [](C value) { return std::isfinite(value); };
  if (!std::all_of(g.relevance, g.relevance + g.batch * g.heads, finite) ||
      !std::all_of(g.budget, g.budget + g.batch, finite))
    select_heads(relevance + 0 * budgets.unsqueeze(1), count);  // raises, naming the value
  return {index, count, weight, relevance, budgets};
}

GateResult budget_gate_cpu(HEADWISE_BUDGET_GATE_PARAMETERS) {
  TORCH_CHECK_VALUE(takes_budget_gate(HEADWISE_BUDGET_GATE_ARGUMENTS),
                    "the arguments of _budget_gate must be consistent: evaluate_budget_gate "
                    "names the one that is not");
  const auto type = x.scalar_type();
  if (type == at::kDouble) return run<double, double>(HEADWISE_BUDGET_GATE_ARGUMENTS);
  GateResult result;
  HEADWISE_DISPATCH_NARROW(type, [&] {
    using input_t = scalar_t;
    HEADWISE_DISPATCH_NARROW(base.scalar_type(), [&] {
      result = run<input_t, scalar_t>(HEADWISE_BUDGET_GATE_ARGUMENTS);
    });
  });
  return result;
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("_budget_gate", budget_gate_cpu); }

}  // namespace
}  // namespace headwise::ops

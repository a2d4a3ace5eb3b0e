#include "ops/cuda/budget_gate.h"

#include <ATen/ATen.h>

#include "kernels/cuda/budget_gate.h"
#include "ops/attention_ops.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/launch.h"
#include "ops/gates/schedule.h"

namespace headwise::ops::device {

using at::Tensor;

bool takes_budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS) {
  if (x.is_cuda() && !device_fits(x.device())) return false;
  const auto type = x.scalar_type();
  if (!at::isFloatingType(type) || !at::isFloatingType(base.scalar_type())) return false;
  for (const auto* p : {&relevance_weight, hidden_weight ? &*hidden_weight : &base,
                        hidden_bias ? &*hidden_bias : &base, out_weight ? &*out_weight : &base,
                        out_bias ? &*out_bias : &base})
    if (p->scalar_type() != base.scalar_type()) return false;
  if (x.dim() != 3 || lse_type(type) != lse_type(base.scalar_type())) return false;
  const auto width = x.sym_size(2).guard_int(__FILE__, __LINE__);
  return width > 0 && width <= kernels::cuda::kWidestGate &&
         base.size(0) <= kernels::cuda::kMostGateHeads &&
         (!key_padding_mask ||
          (key_padding_mask->dim() == 2 && key_padding_mask->sym_size(0) == x.sym_size(0) &&
           key_padding_mask->sym_size(1) == x.sym_size(1)));
}

GateResult budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS) {
  TORCH_CHECK_VALUE(ops::takes_budget_gate(HEADWISE_BUDGET_GATE_ARGUMENTS),
                    "the arguments of _budget_gate must be consistent: evaluate_budget_gate "
                    "names the one that is not");
  const DeviceGuard guard(x.device());
  const auto accumulator = lse_type(x.scalar_type());
  const int64_t B = x.size(0), H = base.size(0);
  const auto sums = x.options().dtype(accumulator), whole = x.options().dtype(at::kInt);
  auto index = at::empty({B, H}, whole), count = at::empty({B}, whole);
  auto weight = at::empty({B, H}, x.options());
  auto relevance = at::empty({B, H}, sums), budgets = at::empty({B}, sums);

  kernels::cuda::GateArguments a{};
  a.input_type = element_of(x.scalar_type()), a.parameter_type = element_of(base.scalar_type());
  a.batch = B, a.rows = x.size(1), a.width = x.size(2), a.heads = H;
  const auto input = dense_rows(x);
  a.x = rows(input);
  Tensor mask;
  if (key_padding_mask) {
    const bool boolean = key_padding_mask->scalar_type() == at::kBool;
    mask = (boolean ? *key_padding_mask : key_padding_mask->to(accumulator)).contiguous();
    if (boolean)
      a.forbid = mask.const_data_ptr<bool>();
    else
      a.add = mask.const_data_ptr();
  }
  const auto means = mean.to(accumulator).contiguous(),
             variances = variance.to(accumulator).contiguous(), bases = base.contiguous(),
             relevances = relevance_weight.contiguous(), at_progress = progress.to(accumulator);
  a.mean = means.const_data_ptr(), a.variance = variances.const_data_ptr();
  a.base = bases.const_data_ptr(), a.relevance_weight = relevances.const_data_ptr();
  a.vectors = aligned(input) && aligned(relevances);
  Tensor hidden, hidden_biases, outs, out_biases;
  if (hidden_weight) {
    hidden = hidden_weight->contiguous(), hidden_biases = hidden_bias->contiguous();
    outs = out_weight->contiguous(), out_biases = out_bias->contiguous();
    a.hidden = hidden.size(0);
    a.hidden_weight = hidden.const_data_ptr(), a.hidden_bias = hidden_biases.const_data_ptr();
    a.out_weight = outs.const_data_ptr(), a.out_bias = out_biases.const_data_ptr();
    a.vectors = a.vectors && aligned(hidden);
  }
  a.progress = at_progress.const_data_ptr();
  a.fixed_budget = budget, a.min_budget = min_budget, a.max_budget = max_budget;
  a.warmup = warmup, a.start_logit = warmup_start(initial_keep, keep);
  a.min_heads = min_heads, a.round_up = rounding == "ceil";
  auto partial = at::empty({kernels::cuda::pool_scratch(a)}, sums);
  a.partial = partial.mutable_data_ptr();
  a.index = index.mutable_data_ptr<int32_t>(), a.count = count.mutable_data_ptr<int32_t>();
  a.weight = weight.mutable_data_ptr(), a.relevance = relevance.mutable_data_ptr();
  a.budget = budgets.mutable_data_ptr();
  check_launch(kernels::cuda::budget_gate(a, current_stream()));
  return {index, count, weight, relevance, budgets};
}

}  // namespace headwise::ops::device

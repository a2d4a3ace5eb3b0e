// A BudgetGate in evaluation as one operator, headwise::_budget_gate: without gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "headwise/export.h"

namespace headwise::ops {

#define HEADWISE_BUDGET_GATE_PARAMETERS                                                           \
  const at::Tensor &x, const std::optional<at::Tensor>&key_padding_mask, const at::Tensor &mean,  \
      const at::Tensor &variance, const at::Tensor &base, const at::Tensor &relevance_weight,     \
      const std::optional<at::Tensor>&hidden_weight, const std::optional<at::Tensor>&hidden_bias, \
      const std::optional<at::Tensor>&out_weight, const std::optional<at::Tensor>&out_bias,       \
      const at::Tensor &progress, double budget, double min_budget, double max_budget,            \
      double keep, double initial_keep, double warmup, int64_t min_heads,                         \
      std::string_view rounding
#define HEADWISE_BUDGET_GATE_ARGUMENTS                                                            \
  x, key_padding_mask, mean, variance, base, relevance_weight, hidden_weight, hidden_bias,        \
      out_weight, out_bias, progress, budget, min_budget, max_budget, keep, initial_keep, warmup, \
      min_heads, rounding

/// True if a kernel takes inputs of these devices, dtypes and shapes.
HEADWISE_API bool takes_budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS);

/// index, count, weight, relevance, budget.
using GateResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace headwise::ops

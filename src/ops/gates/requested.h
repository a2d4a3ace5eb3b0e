// Operators of the requested-budget gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

namespace headwise {

/// Divides budgets [R] among the N heads of a model: row r has ones at the round(budget[r] N) heads
/// (at least one) of largest scores + tilts * (budget[r] - 1/2), zeros elsewhere -> [R, N]. In
/// training with the gradient of soft_top_k, its temperature annealed until `progress` = hard_from.
at::Tensor allocate_budget(const at::Tensor& scores, const at::Tensor& tilts,
                           const at::Tensor& budget, const at::Tensor& progress, bool training,
                           double temperature, double final_temperature, double hard_from);

}  // namespace headwise

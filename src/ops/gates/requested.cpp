// One model, any cost: gates conditioned on a requested budget (arXiv 2605.02697). How the budget
// is divided among layers is ours.
#include "ops/gates/requested.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"
#include "ops/gates/budget.h"
#include "ops/gates/selection_ops.h"

namespace headwise {

at::Tensor allocate_budget(const at::Tensor& scores, const at::Tensor& tilts,
                           const at::Tensor& budget, const at::Tensor& progress, bool training,
                           double temperature, double final_temperature, double hard_from) {
  TORCH_CHECK_VALUE(scores.dim() == 1 && tilts.sizes() == scores.sizes(),
                    "scores and tilts must have the same shape [N], got ", scores.sizes(), " and ",
                    tilts.sizes());
  TORCH_CHECK_VALUE(budget.dim() == 1, "budget must have shape [R], got ", budget.dim(),
                    " dimensions");
  const auto dtype = budget.scalar_type();
  const int64_t heads = scores.size(0);
  const auto rows = scores.to(dtype) + tilts.to(dtype) * (budget.unsqueeze(1) - 0.5);  // [R, N]
  const auto count = budget_count(budget, heads, 1, "round");                          // [R]
  auto hard = selection_mask(select_heads(rows.detach(), count), count, dtype);        // [R, N]
  if (!training) {
    return hard;
  }
  const auto p = progress.detach().to(dtype);
  const auto explored = hard_from > 0 ? (p / hard_from).clamp(0.0, 1.0) : at::ones_like(p);
  const auto tau =
      temperature * at::pow(at::full_like(explored, final_temperature / temperature), explored);
  const auto soft = soft_top_k(rows, count.to(dtype), tau);
  return hard + (soft - soft.detach());
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("allocate_budget", allocate_budget);
}

}  // namespace headwise

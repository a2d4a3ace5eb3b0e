// Heads that sleep and wake. The score is that of Michel et al. (arXiv 1905.10650, eq. 2); when
// heads move is ours, in the manner of dynamic sparse training (Evci et al., arXiv 1911.11134).
#include "ops/gates/sleep.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"

namespace headwise {

at::Tensor held_score(const at::Tensor& score, const at::Tensor& awake, double margin) {
  return score.to(at::kDouble) * (1 + margin * awake.to(at::kDouble));
}

at::Tensor awake_heads(const at::Tensor& score, const at::Tensor& awake, int64_t count,
                       double margin) {
  TORCH_CHECK_VALUE(score.dim() == 1 && awake.sizes() == score.sizes(),
                    "score and awake must have the same shape [N], got ", score.sizes(), " and ",
                    awake.sizes());
  TORCH_CHECK_VALUE(count >= 0 && count <= score.size(0), "count must be in 0..", score.size(0),
                    ", got ", count);
  TORCH_CHECK_VALUE(margin >= 0.0, "margin must not be negative, got ", margin);
  const auto row = held_score(score, awake, margin).unsqueeze(0);  // [1, N]
  const auto counts = at::full({1}, count, row.options().dtype(at::kInt));
  return selection_mask(select_heads(row, counts), counts, awake.scalar_type()).squeeze(0);
}

at::Tensor update_head_score(const at::Tensor& score, const at::Tensor& gradient, double decay,
                             bool first) {
  TORCH_CHECK_VALUE(
      gradient.dim() == 2 && score.dim() == 1 && gradient.sym_size(1) == score.sym_size(0),
      "gradient must have shape [B, H] with H of score, got ", gradient.sizes(), " and ",
      score.sizes());
  const auto now = gradient.detach().to(score.scalar_type()).abs().sum(0);  // [H]
  const auto updated = first ? now : decay * score + (1 - decay) * now;
  // A step that overflowed, as happens under loss scaling, must not enter the average.
  return at::where(at::isfinite(now).all(), updated, score);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("awake_heads", awake_heads);
  m.impl("update_head_score", update_head_score);
}

}  // namespace headwise

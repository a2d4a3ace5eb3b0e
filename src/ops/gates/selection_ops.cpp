// The steps from a gate's numbers to a selection that several gates share. All are composites:
// they run wherever ATen runs, and are traced by torch.compile.
#include "ops/gates/selection_ops.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"
#include "shown.h"

namespace headwise {

at::Tensor masked_mean(const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have shape [B, L, D], got ", x.dim(), " dimensions");
  if (!key_padding_mask) {
    return x.sym_size(1) == 0 ? x.sum(1) : x.mean(1);  // no token has no mean either: zeros
  }
  const auto& mask = *key_padding_mask;
  TORCH_CHECK_VALUE(mask.dim() == 2, "key_padding_mask must have shape [B, L], got ", mask.dim(),
                    " dimensions");
  // A floating mask is added to attention scores, so a key counts exp(mask) times there: the same
  // here (0 -> 1, -inf -> 0).
  const auto weight = mask.scalar_type() == at::kBool ? mask.logical_not().to(x.scalar_type())
                                                      : mask.to(x.scalar_type()).exp();  // [B, L]
  const auto total = at::matmul(weight.unsqueeze(1), x).squeeze(1);                      // [B, D]
  const auto length = weight.sum(1, true);                                               // [B, 1]
  // A sequence of nothing but padding has no mean: zeros.
  return total / length.masked_fill(length.eq(0), 1.0);
}

at::Tensor budget_count(const at::Tensor& budget, int64_t num_heads, int64_t min_heads,
                        std::string_view rounding) {
  TORCH_CHECK_VALUE(rounding == "round" || rounding == "ceil",
                    "rounding must be round or ceil, got ", shown(rounding));
  TORCH_CHECK_VALUE(min_heads >= 0, "min_heads must not be negative, got ", min_heads);
  const auto heads = (budget.detach() * num_heads).nan_to_num(0.0);  // [B]
  // Half a head rounds up: round-half-to-even would give 2 of 4 and 2 of 5 for the same budget.
  const auto whole = rounding == "ceil" ? at::ceil(heads - 1e-4) : at::floor(heads + 0.5);
  return whole.clamp(std::min(min_heads, num_heads), num_heads).to(at::kInt);
}

std::tuple<at::Tensor, at::Tensor> select_nonzero(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have shape [B, H], got ", weight.dim(),
                    " dimensions");
  const auto open = weight.detach().ne(0);          // [B, H]
  const auto count = open.sum(1, false, at::kInt);  // [B]
  // 0 * weight is NaN where weight is: select_heads then raises, naming the head.
  return {select_heads(open.to(at::kFloat) + weight.detach().to(at::kFloat) * 0, count), count};
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("masked_mean", masked_mean);
  m.impl("budget_count", budget_count);
  m.impl("select_nonzero", select_nonzero);
}

}  // namespace headwise

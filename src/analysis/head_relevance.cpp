#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/analysis.h"
#include "ops/clamp.h"

namespace headwise {

at::Tensor held_slope(const at::Tensor& x, const at::Tensor& value) {
  TORCH_CHECK_VALUE(x.sizes() == value.sizes(), "x and value must have the same shape, got ",
                    x.sizes(), " and ", value.sizes());
  const at::Tensor constant = value.detach();
  const at::Tensor zero = x.detach().eq(0);
  const at::Tensor slope = (constant / x.detach().masked_fill(zero, 1)).masked_fill(zero, 0);
  return constant + slope * (x - x.detach());  // the value is kept to the last bit
}

at::Tensor held_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& bias, double eps) {
  const at::Tensor centred = x - x.mean(-1, true);
  const at::Tensor variance = centred.detach().square().mean(-1, true);
  at::Tensor y = centred * (variance + eps).rsqrt();
  if (weight) y = y * weight->detach();
  return bias ? y + *bias : y;
}

at::Tensor relevance_shares(const at::Tensor& context, const at::Tensor& gradient) {
  TORCH_CHECK_VALUE(context.dim() == 4, "context must be [B, H, L, d], got ", context.sizes());
  TORCH_CHECK_VALUE(gradient.sizes() == context.sizes(),
                    "gradient must have the shape of context, ", context.sizes(), ", got ",
                    gradient.sizes());
  const at::Tensor relevance =
      (context.to(at::kDouble) * gradient.to(at::kDouble)).sum(at::IntArrayRef({2, 3}));  // [B, H]
  const at::Tensor total = relevance.abs().sum(1, true);                                  // [B, 1]
  return relevance / total.masked_fill(total.eq(0), 1);
}

at::Tensor causal_penalty(const at::Tensor& logits, double strength, double limit) {
  TORCH_CHECK_VALUE(limit > 0, "limit must be positive, got ", limit);
  return clamp_inclusive(logits, -limit, limit).sum() * -strength;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_roles(const at::Tensor& raised,
                                                            const at::Tensor& lowered) {
  TORCH_CHECK_VALUE(raised.sizes() == lowered.sizes(),
                    "raised and lowered must have the same shape, got ", raised.sizes(), " and ",
                    lowered.sizes());
  return {at::minimum(raised, lowered), 1 - at::maximum(raised, lowered), (raised - lowered).abs()};
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("held_slope", held_slope);
  m.impl("held_layer_norm", held_layer_norm);
  m.impl("relevance_shares", relevance_shares);
  m.impl("causal_penalty", causal_penalty);
  m.impl("causal_roles", causal_roles);
}

}  // namespace headwise

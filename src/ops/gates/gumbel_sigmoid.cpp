// Gates of AdaViT (Meng et al. 2022, arXiv 2111.15668, section 3.2).
#include "ops/gates/gumbel_sigmoid.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"
#include "ops/gates/schedule.h"
#include "ops/gates/selection_ops.h"

namespace headwise {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gumbel_sigmoid_select(
    const at::Tensor& logits, const std::optional<at::Tensor>& uniform, const at::Tensor& progress,
    bool training, bool run_all, double hard_from, double temperature) {
  TORCH_CHECK_VALUE(temperature > 0.0, "temperature must be positive, got ", temperature);
  const auto dtype = logits.scalar_type();
  auto raised = logits;
  if (training && uniform) {
    // The difference of two Gumbel variables is logistic: one uniform number makes it.
    const auto u = uniform->to(dtype).clamp(1e-6, 1.0 - 1e-6);
    const auto soft_phase = 1 - progress.detach().ge(hard_from).to(dtype);
    raised = logits + (at::log(u) - at::log1p(-u)) * soft_phase;
  }
  const auto open = raised.detach().gt(0).to(dtype);  // [B, H]
  // 0 * logits is NaN where a logit is not finite: select_nonzero then refuses it.
  const auto [index, count] = select_nonzero(open + 0 * logits.detach());
  if (!training) {
    return {index, count, open, open.sum(1)};
  }
  const auto soft = at::sigmoid(raised / temperature);
  const auto weight = open + (soft - soft.detach());
  const auto expected = weight.sum(1);  // [B]
  if (run_all) {
    const auto num_heads = weight.sym_size(1).guard_int(__FILE__, __LINE__);
    return {at::arange(num_heads, index.options()).expand_as(index).contiguous(),
            at::full_like(count, num_heads), weight, expected};
  }
  return {index, count, weight, expected};
}

at::Tensor gumbel_sigmoid_regulariser(const at::Tensor& logits, const at::Tensor& weight,
                                      const at::Tensor& progress, double keep, double initial_keep,
                                      double warmup, double strength) {
  if (logits.sym_numel() == 0) return logits.sum();  // an empty batch misses no target
  const auto aimed = scheduled_target(progress, initial_keep, keep, warmup, weight.scalar_type());
  const auto diversity = (weight.mean(0) - aimed.to(weight.device())).abs().mean();
  // H(p) = softplus(l) - l p: no logarithm of a probability that has become 0 or 1.
  const auto entropy = (at::softplus(logits) - logits * at::sigmoid(logits)).mean();
  return (diversity - entropy) * (0.1 * strength);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("gumbel_sigmoid_select", gumbel_sigmoid_select);
  m.impl("gumbel_sigmoid_regulariser", gumbel_sigmoid_regulariser);
}

}  // namespace headwise

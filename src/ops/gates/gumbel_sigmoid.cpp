// Gates of AdaViT (Meng et al. 2022, arXiv 2111.15668, section 3.2).
#include "ops/gates/gumbel_sigmoid.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"
#include "ops/gates/fused.h"
#include "ops/gates/schedule.h"
#include "ops/gates/selection_ops.h"

namespace headwise {

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gumbel_sigmoid_by_operators(
    const at::Tensor& logits, const std::optional<at::Tensor>& uniform, const at::Tensor& progress,
    bool training, bool run_all, double hard_from, double temperature) {
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

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gumbel_sigmoid_select(
    const at::Tensor& logits, const std::optional<at::Tensor>& uniform, const at::Tensor& progress,
    bool training, bool run_all, double hard_from, double temperature) {
  TORCH_CHECK_VALUE(temperature > 0.0, "temperature must be positive, got ", temperature);
  const auto compose = [=](const at::Tensor& scores, const at::Tensor& now) {
    return gumbel_sigmoid_by_operators(scores, uniform, now, training, run_all, hard_from,
                                       temperature);
  };
  const bool shaped = logits.dim() == 2 && (!uniform || uniform->sym_sizes() == logits.sym_sizes());
  if (!shaped || !takes_numbers(logits) || !takes_progress(progress) ||
      needs_gradient({or_undefined(uniform)}) || !fuses({logits, progress, or_undefined(uniform)}))
    return compose(logits, progress);
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, bool, bool, double,
      double);
  const auto call = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_handle<Signature>("headwise::_gumbel_sigmoid_select");
    return op.call(logits, uniform, progress, training, run_all, hard_from, temperature);
  };
  if (!training || !needs_gradient({logits})) {
    const auto [index, count, weight, expected, slope] = call();
    return {index, count, weight, expected};
  }
  using Tensors = FusedStep::Tensors;
  FusedStep step;
  step.forward = [&call]() -> FusedStep::Results {
    const auto [index, count, weight, expected, slope] = call();
    return {{index, count, weight, expected}, {slope}};
  };
  step.backward = [](const Tensors& gradients, const Tensors&, const Tensors& saved) -> Tensors {
    if (!gradients[2].defined() && !gradients[3].defined()) return {{}};
    return {std::get<0>(choice_backward(gradients[2], gradients[3], saved[0], saved[0], {}))};
  };
  step.compose = [compose, now = progress.clone()](const Tensors& inputs) -> Tensors {
    const auto [index, count, weight, expected] = compose(inputs[0], now);
    return {{}, {}, weight, expected};
  };
  step.constant = {0, 1};
  const auto outputs = run_differentiable({logits}, std::move(step));
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
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

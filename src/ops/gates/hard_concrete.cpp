// Hard-concrete gates (Louizos et al., arXiv 1712.01312; for heads Voita et al., arXiv 1905.09418).
#include "ops/gates/hard_concrete.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "ops/gates/fused.h"
#include "ops/gates/schedule.h"
#include "ops/gates/selection_ops.h"
#include "shown.h"

namespace headwise {

at::Tensor hard_concrete(const at::Tensor& log_alpha, const std::optional<at::Tensor>& uniform,
                         double beta, double gamma, double zeta) {
  TORCH_CHECK_VALUE(beta > 0.0, "beta must be positive, got ", beta);
  TORCH_CHECK_VALUE(gamma < 0.0 && zeta > 1.0, "gamma must be below 0 and zeta above 1, got ",
                    gamma, " and ", zeta);
  auto s = log_alpha;
  if (uniform) {
    constexpr double kEps = 1e-6;
    const auto u = uniform->to(log_alpha.scalar_type()) * (1.0 - 2.0 * kEps) + kEps;
    s = (at::log(u) - at::log1p(-u) + log_alpha) / beta;
  }
  return (at::sigmoid(s) * (zeta - gamma) + gamma).clamp(0.0, 1.0);
}

at::Tensor hard_concrete_open(const at::Tensor& log_alpha, double beta, double gamma, double zeta) {
  return at::sigmoid(log_alpha - beta * std::log(-gamma / zeta));
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hard_concrete_by_operators(
    const at::Tensor& log_alpha, const std::optional<at::Tensor>& uniform,
    const at::Tensor& progress, bool training, bool run_all, double hard_from, double beta,
    double gamma, double zeta, bool weight_one) {
  const auto dtype = log_alpha.scalar_type();
  const auto open = hard_concrete_open(log_alpha, beta, gamma, zeta);  // [B, H]
  auto weight = weight_one ? open.detach().gt(0.5).to(dtype)
                           : hard_concrete(log_alpha, {}, beta, gamma, zeta);  // [B, H]
  // Zeros, and NaN where log_alpha is not finite: select_nonzero then refuses it.
  const auto unusable = 0 * log_alpha.detach();
  const auto expected_open = open.sum(1);  // [B]
  if (!training) {
    const auto [index, count] = select_nonzero(weight + unusable);
    return {index, count, weight, expected_open};
  }
  const auto hard_open =
      weight.detach().ne(0).to(dtype).sum(1) + (expected_open - expected_open.detach());
  const auto is_hard = progress.detach().ge(hard_from);  // []
  const auto expected = weight_one ? hard_open : at::where(is_hard, hard_open, expected_open);
  if (weight_one) {
    weight = weight + (open - open.detach());
  } else if (uniform) {
    weight = at::where(is_hard, weight, hard_concrete(log_alpha, uniform, beta, gamma, zeta));
  }
  const auto [index, count] = select_nonzero(weight + unusable);
  if (run_all) {
    const auto num_heads = weight.sym_size(1).guard_int(__FILE__, __LINE__);
    return {at::arange(num_heads, index.options()).expand_as(index).contiguous(),
            at::full_like(count, num_heads), weight, expected};
  }
  return {index, count, weight, expected};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hard_concrete_select(
    const at::Tensor& log_alpha, const std::optional<at::Tensor>& uniform,
    const at::Tensor& progress, bool training, bool run_all, double hard_from, double beta,
    double gamma, double zeta, bool weight_one) {
  const auto compose = [=](const at::Tensor& scores, const at::Tensor& now) {
    return hard_concrete_by_operators(scores, uniform, now, training, run_all, hard_from, beta,
                                      gamma, zeta, weight_one);
  };
  const bool shaped =
      log_alpha.dim() == 2 && beta > 0.0 && gamma < 0.0 && zeta > 1.0 &&
      (!uniform || (uniform->dim() == 2 && uniform->sym_size(1) == log_alpha.sym_size(1) &&
                    (uniform->sym_size(0) == 1 || uniform->sym_size(0) == log_alpha.sym_size(0))));
  if (!shaped || !takes_numbers(log_alpha) || !takes_progress(progress) ||
      needs_gradient({or_undefined(uniform)}) ||
      !fuses({log_alpha, progress, or_undefined(uniform)}))
    return compose(log_alpha, progress);
  using Signature =
      std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
          const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, bool, bool,
          double, double, double, double, bool);
  const auto call = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_handle<Signature>("headwise::_hard_concrete_select");
    return op.call(log_alpha, uniform, progress, training, run_all, hard_from, beta, gamma, zeta,
                   weight_one);
  };
  if (!needs_gradient({log_alpha})) {
    const auto [index, count, weight, expected, slope, expected_slope] = call();
    return {index, count, weight, expected};
  }
  using Tensors = FusedStep::Tensors;
  FusedStep step;
  step.forward = [&call]() -> FusedStep::Results {
    const auto [index, count, weight, expected, slope, expected_slope] = call();
    return {{index, count, weight, expected}, {slope, expected_slope}};
  };
  step.backward = [](const Tensors& gradients, const Tensors&, const Tensors& saved) -> Tensors {
    if (!gradients[2].defined() && !gradients[3].defined()) return {{}};
    return {std::get<0>(choice_backward(gradients[2], gradients[3], saved[0], saved[1], {}))};
  };
  step.compose = [compose, now = progress.clone()](const Tensors& inputs) -> Tensors {
    const auto [index, count, weight, expected] = compose(inputs[0], now);
    return {{}, {}, weight, expected};
  };
  step.constant = {0, 1};
  if (weight_one && !training) step.constant.push_back(2);
  const auto outputs = run_differentiable({log_alpha}, std::move(step));
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

at::Tensor lagrangian(const at::Tensor& off, const at::Tensor& multipliers) {
  // Descent on the loss must ascend in the multipliers: the value is unchanged, the gradient
  // negated.
  const auto m = (2 * multipliers.detach() - multipliers).to(off.scalar_type());
  return m.select(0, 0) * off + m.select(0, 1) * off.square();
}

at::Tensor target_penalty(at::TensorList expected_heads, at::IntArrayRef num_heads,
                          const at::Tensor& progress, double keep, double initial_keep,
                          double warmup, double strength, std::string_view form,
                          const std::optional<at::Tensor>& multipliers) {
  TORCH_CHECK_VALUE(!expected_heads.empty() && expected_heads.size() == num_heads.size(),
                    "expected_heads and num_heads must have the same length and not be empty, got ",
                    expected_heads.size(), " and ", num_heads.size());
  // An empty batch has no share, so it misses no target.
  if (expected_heads[0].sym_numel() == 0) return expected_heads[0].sum();
  int64_t heads = 0;
  at::Tensor expected;
  for (size_t i = 0; i < num_heads.size(); ++i) {
    const auto mean = expected_heads[i].mean().to(progress.device());  // over the batch
    expected = i == 0 ? mean : expected + mean;
    heads += num_heads[i];
  }
  if (form == "l0") {
    return expected * (strength / static_cast<double>(num_heads.size()));
  }
  const auto dtype = expected.scalar_type();
  const auto off = expected / static_cast<double>(std::max<int64_t>(heads, 1)) -
                   scheduled_target(progress, initial_keep, keep, warmup, dtype);
  if (form == "squared") {
    return off.square() * strength;
  }
  if (form == "adavit") {
    return off.abs() * strength;
  }
  TORCH_CHECK_VALUE(form == "lagrangian", "penalty must be squared, lagrangian, l0 or adavit, got ",
                    shown(form));
  TORCH_CHECK_VALUE(multipliers.has_value(), "multipliers [2] must be given for lagrangian");
  return lagrangian(off, *multipliers) * strength;
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("hard_concrete", hard_concrete);
  m.impl("hard_concrete_open", hard_concrete_open);
  m.impl("hard_concrete_select", hard_concrete_select);
  m.impl("target_penalty", target_penalty);
}

}  // namespace headwise

// The budget gate (BudgetFormer, arXiv 2604.22583): a head budget and a relevance per head for
// every input. Where the paper does not specify something the choices are ours, as noted at each
// function.
#include "ops/gates/budget.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>

#include "headwise/selection.h"
#include "ops/clamp.h"
#include "ops/gates/fused.h"
#include "ops/gates/schedule.h"
#include "ops/gates/selection_ops.h"
#include "recomputation.h"
#include "shown.h"

namespace headwise {
namespace {

// sigmoid(20) is 1 in float32: beyond this many temperatures a head is fully open or closed.
constexpr double kSaturation = 20.0;
constexpr int64_t kCandidates = 64;
constexpr int kRounds = 3;
// Batches that the running statistics remember.
constexpr double kMemory = 50.0;

// Mean of t [B]; 0 for an empty batch, because NaN would end a training.
at::Tensor batch_mean(const at::Tensor& t) { return t.sym_numel() == 0 ? t.sum() : t.mean(); }

// The t of each row for which sum_h sigmoid((scores - t) / temperature) = mass, by evaluating a
// grid of candidates at once and refining around the answer: a fixed number of tensor operations,
// no loop that depends on data, so it compiles and never waits for a device.
at::Tensor solve_threshold(const at::Tensor& scores, const at::Tensor& mass,
                           const at::Tensor& temperature) {
  auto low = scores.amin(1, true) - kSaturation * temperature;               // [B, 1]
  auto high = scores.amax(1, true) + kSaturation * temperature;              // [B, 1]
  const auto steps = at::linspace(0.0, 1.0, kCandidates, scores.options());  // [n]
  for (int round = 0; round < kRounds; ++round) {
    const auto candidates = low + (high - low) * steps;  // [B, n]
    const auto reached =
        at::sigmoid((scores.unsqueeze(1) - candidates.unsqueeze(2)) / temperature).sum(2);
    const auto position =
        reached.ge(mass.unsqueeze(1)).sum(1, true).sub(1).clamp(0, kCandidates - 2);  // [B, 1]
    low = candidates.gather(1, position);
    high = candidates.gather(1, position + 1);
  }
  return low;
}

at::Tensor relevance_by_operators(const at::Tensor& features, const at::Tensor& base,
                                  const at::Tensor& weight, const at::Tensor& progress,
                                  bool training, double static_until) {
  const auto dtype = features.scalar_type();
  // 1 / sqrt(D): a step of the weight moves the relevance alike for every width.
  const double scale = 1.0 / std::sqrt(static_cast<double>(weight.size(1)));
  auto residual = at::linear(features, weight.to(dtype)) * scale;  // [B, H]
  if (training) {
    residual = residual * reached(progress, static_until, dtype);
  }
  return base.to(dtype) + residual.to(dtype);
}

std::tuple<at::Tensor, at::Tensor> budget_by_operators(
    const at::Tensor& features, const at::Tensor& hidden_weight, const at::Tensor& hidden_bias,
    const at::Tensor& out_weight, const at::Tensor& out_bias, const at::Tensor& progress,
    bool training, double min_budget, double max_budget, double keep, double initial_keep,
    double warmup, double static_until) {
  const auto dtype = features.scalar_type();
  // 1 / sqrt(D) gives the input norm one, so that a step of the weights moves a hidden unit little.
  const double scale = 1.0 / std::sqrt(static_cast<double>(hidden_weight.size(1)));
  const auto hidden = at::gelu(
      at::linear(features * scale, hidden_weight.to(dtype), hidden_bias.to(dtype)));  // [B, h]
  auto logit = at::linear(hidden, out_weight.to(dtype)).squeeze(1).to(dtype);         // [B]
  if (training) {
    logit = logit * reached(progress, static_until, dtype);
  }
  logit = logit + out_bias.to(dtype) + warmup_logit(progress, initial_keep, keep, warmup, dtype);
  const auto asked = at::sigmoid(logit);
  return {clamp_inclusive(asked, min_budget, max_budget), asked};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> budget_select_by_operators(
    const at::Tensor& relevance, const at::Tensor& budget, const at::Tensor& progress,
    const std::optional<at::Tensor>& noise, bool training, bool run_all, double temperature,
    double final_temperature, double noise_scale, double hard_from, bool straight_through,
    bool soft_weight, int64_t min_heads, std::string_view rounding) {
  const auto dtype = relevance.scalar_type();
  const auto num_heads = relevance.sym_size(1).guard_int(__FILE__, __LINE__);
  const auto p = progress.detach().to(dtype);
  // How much of the exploration has passed: 1 when the hard selection begins.
  const auto explored = hard_from > 0 ? (p / hard_from).clamp(0.0, 1.0) : at::ones_like(p);
  auto scores = relevance;
  if (training && noise) {
    scores = scores + noise->to(dtype) * (1 - explored) * noise_scale;
  }
  const auto count = budget_count(budget, num_heads, min_heads, rounding);  // [B]
  // 0 * budget is NaN where the budget is: select_heads then raises the error.
  const auto index =
      select_heads(scores.detach() + 0 * budget.detach().unsqueeze(1), count);  // [B, H]
  const auto chosen = selection_mask(index, count, dtype);                      // [B, H]
  if (!training && !soft_weight) {
    return {index, count, chosen, budget * num_heads};
  }
  const auto tau =
      temperature * at::pow(at::full_like(explored, final_temperature / temperature), explored);
  const auto soft = soft_top_k(scores, budget * num_heads, tau);  // [B, H]
  if (!training) {
    return {index, count, chosen * soft, budget * num_heads};
  }
  const auto through = soft - soft.detach();  // zeros that carry the gradient
  const auto hard = soft_weight ? chosen * soft + (1 - chosen) * through : chosen + through;
  const auto heads = budget * num_heads;                               // [B]
  const auto hard_heads = count.to(dtype) + (heads - heads.detach());  // [B]
  const auto is_hard = progress.detach().ge(hard_from);                // []
  const auto expected = at::where(is_hard, hard_heads, heads);
  const auto weight = straight_through ? hard : at::where(is_hard, hard, soft);
  const auto all = at::arange(num_heads, index.options()).expand_as(index);
  const auto full = at::full_like(count, num_heads);
  if (run_all) {
    return {all.contiguous(), full, weight, expected};
  }
  if (straight_through) {
    return {index, count, weight, expected};
  }
  return {at::where(is_hard, index, all), at::where(is_hard, count, full), weight, expected};
}

}  // namespace

at::Tensor soft_top_k(const at::Tensor& scores, const at::Tensor& mass,
                      const at::Tensor& temperature) {
  TORCH_CHECK_VALUE(scores.dim() == 2, "scores must have shape [B, H], got ", scores.dim(),
                    " dimensions");
  TORCH_CHECK_VALUE(mass.dim() == 1, "mass must have shape [B], got ", mass.dim(), " dimensions");
  if (scores.sym_size(1) == 0) {
    return scores;
  }
  const auto tau = temperature.detach().to(scores.scalar_type());
  auto t = solve_threshold(scores.detach(), mass.detach(), tau);  // [B, 1]
  // Two of Newton's steps from the solution polish the root. As functions of scores and mass they
  // also follow the implicit function t(scores, mass): an error e of the start becomes one of e^4,
  // so the first three derivatives at the solution are those of t.
  for (int step = 0; step < 2; ++step) {
    const auto open = at::sigmoid((scores - t) / tau);
    const auto slope = (open * (1 - open)).sum(1, true).clamp_min(1e-6) / tau;
    t = t + (open.sum(1, true) - mass.unsqueeze(1)) / slope;
  }
  const auto open = at::sigmoid((scores - t) / tau);
  // A mass of H has its root at minus infinity: every head, exactly.
  const auto full = mass.detach().ge(scores.sym_size(1)).unsqueeze(1);
  return at::where(full, at::ones_like(open), open);
}

at::Tensor gate_features(const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask) {
  const auto pooled = masked_mean(x.detach(), key_padding_mask);  // [B, D]
  const bool narrow = pooled.scalar_type() == at::kHalf || pooled.scalar_type() == at::kBFloat16;
  return narrow ? pooled.to(at::kFloat) : pooled;
}

at::Tensor feature_moments(const at::Tensor& features) {
  const auto rows = features.detach().to(at::kDouble);               // [B, D]
  const auto count = at::ones_like(rows).select(1, 0).sum(0, true);  // [1]
  return at::cat({count, rows.sum(0), rows.square().sum(0)});
}

void update_statistics(const at::Tensor& moments, const at::Tensor& mean,
                       const at::Tensor& variance, const at::Tensor& batches) {
  if (recomputing()) return;
  const auto width = mean.sym_size(0);
  const auto dtype = mean.scalar_type();
  const auto count = moments.select(0, 0);
  const auto exact = moments.narrow_symint(0, 1, width) / count;  // [D]
  const auto batch_mean = exact.to(dtype);
  const auto batch_variance =
      (moments.narrow_symint(0, 1 + width, width) / count - exact.square()).clamp_min(0).to(dtype);
  // Nothing is learnt from an empty batch, nor from one that overflowed, as happens under mixed
  // precision: it would corrupt the statistics permanently.
  const auto sound = batch_mean.isfinite().all() & batch_variance.isfinite().all();  // []
  const auto seen = batches + 1;
  const auto share = seen.reciprocal().clamp_min(1.0 / kMemory).to(dtype);  // of this batch
  const auto step = batch_mean - mean;
  // The variance of the mixture of what was seen before and this batch: right for a batch of one.
  const auto new_variance =
      variance * (1 - share) + batch_variance * share + step.square() * (share * (1 - share));
  variance.copy_(at::where(sound, new_variance, variance));
  mean.copy_(at::where(sound, mean + step * share, mean));
  batches.copy_(at::where(sound, seen, batches));
}

at::Tensor standardize(const at::Tensor& features, const at::Tensor& mean,
                       const at::Tensor& variance) {
  const auto dtype = features.scalar_type();
  return (features - mean.to(dtype)) * (variance.to(dtype) + 1e-4).rsqrt();
}

// NOLINTBEGIN(performance-unnecessary-value-param): the signature of the operator, whose tensors
// change.
at::Tensor learn_features_composed(const at::Tensor& x,
                                   const std::optional<at::Tensor>& key_padding_mask,
                                   at::Tensor mean, at::Tensor variance, at::Tensor batches) {
  const auto features = gate_features(x, key_padding_mask);
  update_statistics(feature_moments(features), mean, variance, batches);
  return standardize(features, mean, variance);
}

at::Tensor learn_features(const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask,
                          at::Tensor mean, at::Tensor variance, at::Tensor batches) {
  static const auto op =
      operator_handle<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, at::Tensor,
                                 at::Tensor, at::Tensor)>("headwise::learn_features");
  return op.call(x, key_padding_mask, mean, variance, batches);
}
// NOLINTEND(performance-unnecessary-value-param)

at::Tensor input_relevance(const at::Tensor& features, const at::Tensor& base,
                           const at::Tensor& weight, const at::Tensor& progress, bool training,
                           double static_until) {
  const bool shaped = features.dim() == 2 && base.dim() == 1 && weight.dim() == 2 &&
                      features.sym_size(1) == weight.sym_size(1) &&
                      base.sym_size(0) == weight.sym_size(0) && features.sym_size(1) > 0;
  if (!shaped || !takes_numbers(features) || needs_gradient({features}) ||
      !fuses({features, base, weight, progress}))
    return relevance_by_operators(features, base, weight, progress, training, static_until);
  using Signature = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, double);
  const auto call = [=] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_handle<Signature>("headwise::_input_relevance");
    return op.call(features, base, weight, progress, training, static_until);
  };
  if (!needs_gradient({base, weight})) return std::get<0>(call());
  using Tensors = FusedStep::Tensors;
  FusedStep step;
  step.forward = [&call]() -> FusedStep::Results {
    const auto [relevance, scale] = call();
    return {{relevance}, {scale}};
  };
  step.backward = [features](const Tensors& gradients, const Tensors& inputs,
                             const Tensors& saved) -> Tensors {
    const WithoutAutocast exact;
    const auto& grad = gradients[0];  // [B, H]
    const auto product = at::mm(grad.t(), features).mul_(saved[0].item<double>());
    return {grad.sum(0).to(inputs[0].scalar_type()), product.to(inputs[1].scalar_type())};
  };
  step.compose = [=, now = progress.clone()](const Tensors& inputs) -> Tensors {
    return {relevance_by_operators(features, inputs[0], inputs[1], now, training, static_until)};
  };
  return run_differentiable({base, weight}, std::move(step))[0];
}

at::Tensor static_relevance(const at::Tensor& base, const at::Tensor& x) {
  const bool narrow = base.scalar_type() == at::kHalf || base.scalar_type() == at::kBFloat16;
  return base.to(narrow ? at::kFloat : base.scalar_type())
      .unsqueeze(0)
      .expand_symint({x.sym_size(0), base.sym_size(0)});
}

std::tuple<at::Tensor, at::Tensor> head_budget(
    const at::Tensor& features, const at::Tensor& hidden_weight, const at::Tensor& hidden_bias,
    const at::Tensor& out_weight, const at::Tensor& out_bias, const at::Tensor& progress,
    bool training, double min_budget, double max_budget, double keep, double initial_keep,
    double warmup, double static_until) {
  const bool shaped =
      features.dim() == 2 && hidden_weight.dim() == 2 && out_weight.dim() == 2 &&
      features.sym_size(1) == hidden_weight.sym_size(1) && features.sym_size(1) > 0 &&
      out_weight.sym_size(0) == 1 && out_weight.sym_size(1) == hidden_weight.sym_size(0) &&
      hidden_bias.dim() == 1 && hidden_bias.sym_size(0) == hidden_weight.sym_size(0) &&
      out_bias.sym_numel() == 1;
  const auto compose = [=](const FusedStep::Tensors& p, const at::Tensor& now) {
    return budget_by_operators(features, p[0], p[1], p[2], p[3], now, training, min_budget,
                               max_budget, keep, initial_keep, warmup, static_until);
  };
  const FusedStep::Tensors parameters{hidden_weight, hidden_bias, out_weight, out_bias};
  if (!shaped || !takes_numbers(features) || needs_gradient({features}) ||
      !fuses({features, hidden_weight, hidden_bias, out_weight, out_bias, progress}))
    return compose(parameters, progress);
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, bool, double, double, double, double, double, double);
  const auto call = [=] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_handle<Signature>("headwise::_head_budget");
    return op.call(features, hidden_weight, hidden_bias, out_weight, out_bias, progress, training,
                   min_budget, max_budget, keep, initial_keep, warmup, static_until);
  };
  if (!needs_gradient({hidden_weight, hidden_bias, out_weight, out_bias})) {
    const auto [budget, asked, hidden, scale] = call();
    return {budget, asked};
  }
  using Tensors = FusedStep::Tensors;
  FusedStep step;
  step.forward = [&call]() -> FusedStep::Results {
    const auto [budget, asked, hidden, scale] = call();
    return {{budget, asked}, {asked, hidden, scale}};
  };
  step.backward = [=](const Tensors& gradients, const Tensors& inputs,
                      const Tensors& saved) -> Tensors {
    using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
        const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double);
    static const auto op = operator_handle<Backward>("headwise::_head_budget_backward");
    const auto [weight, bias, out, shift] =
        op.call(if_defined(gradients[0]), if_defined(gradients[1]), features, inputs[2], saved[0],
                saved[1], saved[2], min_budget, max_budget);
    return {weight.to(inputs[0].scalar_type()), bias.to(inputs[1].scalar_type()),
            out.to(inputs[2].scalar_type()), shift.view_as(inputs[3]).to(inputs[3].scalar_type())};
  };
  step.compose = [compose, now = progress.clone()](const Tensors& inputs) -> Tensors {
    const auto [budget, asked] = compose(inputs, now);
    return {budget, asked};
  };
  const auto outputs = run_differentiable(parameters, std::move(step));
  return {outputs[0], outputs[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> budget_select(
    const at::Tensor& relevance, const at::Tensor& budget, const at::Tensor& progress,
    const std::optional<at::Tensor>& noise, bool training, bool run_all, double temperature,
    double final_temperature, double noise_scale, double hard_from, bool straight_through,
    bool soft_weight, int64_t min_heads, std::string_view rounding) {
  const auto compose = [=, rounding = std::string(rounding)](const at::Tensor& scores,
                                                             const at::Tensor& share,
                                                             const at::Tensor& now) {
    return budget_select_by_operators(scores, share, now, noise, training, run_all, temperature,
                                      final_temperature, noise_scale, hard_from, straight_through,
                                      soft_weight, min_heads, rounding);
  };
  const bool shaped = relevance.dim() == 2 && relevance.sym_size(1) > 0 && budget.dim() == 1 &&
                      budget.sym_size(0) == relevance.sym_size(0) &&
                      budget.scalar_type() == relevance.scalar_type() && min_heads >= 0 &&
                      (rounding == "round" || rounding == "ceil") &&
                      (!noise || noise->sym_sizes() == relevance.sym_sizes());
  const bool differentiable = needs_gradient({relevance, budget});
  // Evaluation with soft weights is rare, and its derivative another one.
  if (!shaped || !takes_numbers(relevance) || !takes_progress(progress) ||
      needs_gradient({or_undefined(noise)}) || (differentiable && !training && soft_weight) ||
      !fuses({relevance, budget, progress, or_undefined(noise)}))
    return compose(relevance, budget, progress);
  using Signature =
      std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
          const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
          bool, bool, double, double, double, double, bool, bool, int64_t, std::string_view);
  const auto call = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = operator_handle<Signature>("headwise::_budget_select");
    return op.call(relevance, budget, progress, noise, training, run_all, temperature,
                   final_temperature, noise_scale, hard_from, straight_through, soft_weight,
                   min_heads, rounding);
  };
  if (!differentiable) {
    const auto [index, count, weight, expected, slope, share] = call();
    return {index, count, weight, expected};
  }
  using Tensors = FusedStep::Tensors;
  FusedStep step;
  step.forward = [&call]() -> FusedStep::Results {
    const auto [index, count, weight, expected, slope, share] = call();
    return {{index, count, weight, expected}, {slope, share}};
  };
  step.backward = [heads = relevance.size(1)](const Tensors& gradients, const Tensors&,
                                              const Tensors& saved) -> Tensors {
    const auto& expected = gradients[3];
    if (!gradients[2].defined() && !expected.defined()) return {{}, {}};
    // Evaluation has no slopes: only the expected number of heads moves with the budget.
    if (saved[0].numel() == 0) return {{}, expected.defined() ? expected * heads : expected};
    const auto [scores, share] = choice_backward(gradients[2], expected, saved[0], {}, saved[1]);
    return {scores, share};
  };
  step.compose = [compose, now = progress.clone()](const Tensors& inputs) -> Tensors {
    const auto [index, count, weight, expected] = compose(inputs[0], inputs[1], now);
    return {{}, {}, weight, expected};
  };
  step.constant = {0, 1};
  if (!training) step.constant.push_back(2);
  if (!budget.requires_grad()) step.constant.push_back(3);
  const auto outputs = run_differentiable({relevance, budget}, std::move(step));
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

at::Tensor gumbel_noise(const at::Tensor& uniform) {
  const auto u = uniform.clamp(1e-6, 1.0 - 1e-6);
  return -at::log(-at::log(u));
}

at::Tensor relevance_entropy(const at::Tensor& relevance) {
  const auto num_heads = relevance.sym_size(1).guard_int(__FILE__, __LINE__);
  if (num_heads < 2) {
    return relevance.sum() * 0;
  }
  const auto log_p = at::log_softmax(relevance, 1);
  return -batch_mean((log_p.exp() * log_p).sum(1)) / std::log(static_cast<double>(num_heads));
}

at::Tensor budget_bounds(const at::Tensor& asked, double min_budget, double max_budget) {
  const auto compose = [=](const at::Tensor& share) {
    return batch_mean((at::relu(min_budget - share) + at::relu(share - max_budget)).square());
  };
  if (!needs_gradient({asked}) || !fuses({asked}) || asked.numel() == 0 ||
      !(min_budget <= max_budget))
    return compose(asked);
  using Tensors = FusedStep::Tensors;
  FusedStep step;
  step.forward = [&]() -> FusedStep::Results {
    auto off = asked - asked.clamp(min_budget, max_budget);
    return {{off.square().mean()}, {off}};
  };
  step.backward = [](const Tensors& gradients, const Tensors&, const Tensors& saved) -> Tensors {
    if (!gradients[0].defined()) return {{}};
    const auto& off = saved[0];
    return {off * (gradients[0] * (2.0 / static_cast<double>(off.numel())))};
  };
  step.compose = [compose](const Tensors& inputs) -> Tensors { return {compose(inputs[0])}; };
  return run_differentiable({asked}, std::move(step))[0];
}

at::Tensor importance_start(const at::Tensor& importance, double keep, double sharpness) {
  TORCH_CHECK_VALUE(importance.dim() == 1, "importance must have shape [heads], got ",
                    importance.dim(), " dimensions");
  TORCH_CHECK_VALUE(keep > 0.0 && keep <= 1.0, "keep must be in (0, 1], got ", keep);
  const auto heads = importance.size(0);
  // In ascending order; of equal heads the lower one ranks higher, as in select_heads.
  const auto order = heads - 1 - importance.flip(0).argsort(/*stable=*/true, 0, false);
  const auto place = at::arange(heads, importance.options());
  const auto rank = at::empty_like(place).scatter(0, order, place);  // 0 .. heads - 1
  // The border falls halfway between two heads.
  const double kept = std::round(keep * static_cast<double>(heads));
  return (rank + 0.5 - (static_cast<double>(heads) - kept)) *
         (sharpness / static_cast<double>(std::max<int64_t>(heads, 1)));
}

std::tuple<std::vector<at::Tensor>, std::vector<double>> gate_starts(
    at::TensorList importance, const std::vector<std::string>& layers, at::IntArrayRef num_heads,
    double keep, double sharpness) {
  TORCH_CHECK_VALUE(keep > 0.0 && keep <= 1.0, "keep must be in (0, 1], got ", keep);
  std::vector<at::Tensor> scores;
  for (size_t i = 0; i < importance.size(); ++i) {
    const auto& score = importance[i];
    TORCH_CHECK_VALUE(score.sizes() == at::IntArrayRef({num_heads[i]}), "importance of ",
                      layer_called(layers[i]), " must have ", num_heads[i], " heads, got ",
                      score.sizes());
    TORCH_CHECK_VALUE(at::isfinite(score).all().item<bool>(), "importance of ",
                      layer_called(layers[i]), " must be finite, got NaN or infinity");
    scores.push_back(score.to(at::kCPU, at::kDouble));
  }
  if (scores.empty()) return {};
  auto relevance = importance_start(at::cat(scores), keep, sharpness).split_with_sizes(num_heads);
  std::vector<double> shares;
  for (const auto& part : relevance) {
    shares.push_back(part.numel() > 0 ? part.gt(0).to(at::kDouble).mean().item<double>() : 0.0);
  }
  return {std::move(relevance), std::move(shares)};
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("gate_starts", [](at::TensorList importance, const c10::List<std::string>& layers,
                           at::IntArrayRef num_heads, double keep, double sharpness) {
    return gate_starts(importance, layers.vec(), num_heads, keep, sharpness);
  });
  m.impl("soft_top_k", soft_top_k);
  m.impl("gate_features", gate_features);
  m.impl("feature_moments", feature_moments);
  m.impl("standardize", standardize);
  m.impl("importance_start", importance_start);
  m.impl("input_relevance", input_relevance);
  m.impl("head_budget", head_budget);
  m.impl("budget_select", budget_select);
  m.impl("static_relevance", static_relevance);
  m.impl("gumbel_noise", gumbel_noise);
  m.impl("relevance_entropy", relevance_entropy);
  m.impl("budget_bounds", budget_bounds);
}

// One operator for a compiler too: only when it runs is it known whether a forward is repeated.
TORCH_LIBRARY_IMPL(headwise, CompositeExplicitAutograd, m) {
  m.impl("update_statistics", update_statistics);
  m.impl("learn_features", learn_features_composed);
}
TORCH_LIBRARY_IMPL(headwise, ADInplaceOrView, m) {
  for (const char* name : {"update_statistics", "learn_features"})
    m.impl(name, torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}
// Its result carries no gradient, though x may.
TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("learn_features", torch::CppFunction::makeFallthrough());
  for (const char* name :
       {"_input_relevance", "_head_budget", "_head_budget_backward", "_budget_select",
        "_hard_concrete_select", "_gumbel_sigmoid_select", "_choice_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise

// The steps of gates on a CPU, and their derivatives: tensors in, raw pointers to src/kernels/cpu.
// src/ops/gates calls them where they apply (ops/gates/fused.h).
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "headwise/selection.h"
#include "kernels/budget_gate.h"
#include "kernels/cpu/gate_choice.h"
#include "kernels/cpu/pooled_input.h"
#include "kernels/gate_choice.h"
#include "ops/cpu/pooled_input.h"
#include "ops/gates/budget.h"
#include "ops/gates/fused.h"
#include "ops/gates/schedule.h"
#include "ops/gates/selection_ops.h"
#include "recomputation.h"

namespace headwise::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define HEADWISE_DISPATCH_SUMS(type, ...)                      \
  AT_DISPATCH_SWITCH(type, "gate",                             \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kDouble, __VA_ARGS__))

/// Contiguous and in this dtype.
Tensor contiguous_as(const Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}
void check_shape(const char* name, const OptionalTensor& t, at::IntArrayRef shape) {
  if (t) check_shape(name, *t, shape);
}
/// The same, or no elements: not wanted.
void check_wanted(const char* name, const OptionalTensor& t, at::IntArrayRef shape) {
  if (t && t->numel() > 0) check_shape(name, *t, shape);
}

template <typename C>
const C* data_or_null(const OptionalTensor& t) {
  return t && t->numel() > 0 ? t->const_data_ptr<C>() : nullptr;
}
template <typename C>
C* writable_or_null(Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<C>() : nullptr;
}

struct Progress {
  explicit Progress(const Tensor& progress) : type(progress.scalar_type()) {
    TORCH_CHECK_VALUE(progress.numel() == 1, "progress must have one element, got shape ",
                      progress.sizes());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "progress", [&] {
      value = static_cast<double>(progress.const_data_ptr<scalar_t>()[0]);
    });
  }
  /// As reached() compares: in the dtype of progress.
  bool reached(double when) const {
    bool answer = false;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "progress", [&] {
      answer = static_cast<scalar_t>(value) >= static_cast<scalar_t>(when);
    });
    return answer;
  }
  double value = 0;
  at::ScalarType type;
};

/// What every gate's choice returns; slopes have no elements if they are not wanted.
struct GateResults {
  Tensor index, count, weight, expected, slope;
  GateResults(const Tensor& scores, bool slopes) {
    TORCH_CHECK_VALUE(scores.dim() == 2, "scores must have shape [B, H], got ", scores.sizes());
    const auto B = scores.size(0), H = scores.size(1);
    const auto whole = at::TensorOptions(at::kInt);
    const auto type = at::TensorOptions(scores.scalar_type());
    index = at::empty({B, H}, whole), count = at::empty({B}, whole);
    weight = at::empty({B, H}, type), expected = at::empty({B}, type);
    slope = slopes ? at::empty({B, H}, type) : at::empty({0}, type);
  }
  template <typename C>
  void write_to(kernels::GateChoice<C>& choice, const Tensor& scores) {
    choice.batch = scores.size(0), choice.heads = scores.size(1);
    choice.scores = scores.const_data_ptr<C>();
    choice.index = index.mutable_data_ptr<int32_t>();
    choice.count = count.mutable_data_ptr<int32_t>();
    choice.weight = weight.mutable_data_ptr<C>();
    choice.expected = expected.mutable_data_ptr<C>();
    choice.slope = writable_or_null<C>(slope);
  }
};

/// Raises, naming the value, if a score is not finite.
template <typename C>
void check_finite(const Tensor& scores) {
  const C* const values = scores.const_data_ptr<C>();
  const auto finite = [](C value) { return std::isfinite(value); };
  if (!std::all_of(values, values + scores.numel(), finite)) select_nonzero(scores * 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> budget_select_cpu(
    const Tensor& relevance, const Tensor& budget, const Tensor& progress,
    const OptionalTensor& noise, bool training, bool run_all, double temperature,
    double final_temperature, double noise_scale, double hard_from, bool straight_through,
    bool soft_weight, int64_t min_heads, std::string_view rounding) {
  const auto type = relevance.scalar_type();
  const auto scores = relevance.contiguous(), budgets = contiguous_as(budget, type);
  TORCH_CHECK_VALUE(budgets.dim() == 1 && budgets.size(0) == scores.size(0),
                    "budget must have shape [", scores.size(0), "], got ", budgets.sizes());
  const bool noisy = training && noise.has_value();
  OptionalTensor added;
  if (noisy) {
    added = contiguous_as(*noise, type);
    TORCH_CHECK_VALUE(added->sizes() == scores.sizes(), "noise must have shape ", scores.sizes(),
                      ", got ", added->sizes());
  }
  GateResults r(scores, training || soft_weight);
  auto share = r.slope.numel() > 0 ? at::empty_like(r.expected) : at::empty({0}, r.slope.options());
  const Progress now(progress);
  const double explored = hard_from > 0 ? std::clamp(now.value / hard_from, 0.0, 1.0) : 1.0;
  HEADWISE_DISPATCH_SUMS(type, [&] {
    kernels::BudgetChoice<scalar_t> g{};
    r.write_to(g, scores);
    g.budget = budgets.template const_data_ptr<scalar_t>();
    g.noise = data_or_null<scalar_t>(added);
    g.noise_scale = (1 - explored) * noise_scale;
    g.tau = temperature * std::pow(final_temperature / temperature, explored);
    g.training = training, g.run_all = run_all, g.hard = training && now.reached(hard_from);
    g.straight_through = straight_through, g.soft_weight = soft_weight;
    g.min_heads = min_heads, g.round_up = rounding == "ceil";
    g.share = writable_or_null<scalar_t>(share);
    const auto finite = [](scalar_t value) { return std::isfinite(value); };
    if (!std::all_of(g.scores, g.scores + scores.numel(), finite) ||
        !std::all_of(g.budget, g.budget + g.batch, finite) ||
        (g.noise && !std::all_of(g.noise, g.noise + scores.numel(), finite))) {
      auto raised = scores + 0 * budgets.unsqueeze(1);
      if (added) raised = raised + *added * g.noise_scale;
      select_heads(raised, budget_count(budgets, g.heads, min_heads, rounding));  // names the value
    }
    kernels::choose_budget(g);
  });
  return {r.index, r.count, r.weight, r.expected, r.slope, share};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hard_concrete_select_cpu(
    const Tensor& log_alpha, const OptionalTensor& uniform, const Tensor& progress, bool training,
    bool run_all, double hard_from, double beta, double gamma, double zeta, bool weight_one) {
  const auto type = log_alpha.scalar_type();
  const auto scores = log_alpha.contiguous();
  OptionalTensor drawn;
  if (training && uniform) {
    drawn = contiguous_as(*uniform, type);
    TORCH_CHECK_VALUE(drawn->dim() == 2 && drawn->size(1) == scores.size(1) &&
                          (drawn->size(0) == 1 || drawn->size(0) == scores.size(0)),
                      "uniform must have shape [1, H] or that of log_alpha ", scores.sizes(),
                      ", got ", drawn->sizes());
  }
  GateResults r(scores, true);
  auto expected_slope = at::empty_like(r.slope);
  const Progress now(progress);
  HEADWISE_DISPATCH_SUMS(type, [&] {
    check_finite<scalar_t>(scores);
    kernels::HardConcreteChoice<scalar_t> g{};
    r.write_to(g, scores);
    g.uniform = data_or_null<scalar_t>(drawn);
    g.uniform_batch = drawn && drawn->size(0) > 1 ? g.heads : 0;
    g.training = training, g.run_all = run_all, g.hard = training && now.reached(hard_from);
    g.beta = beta, g.gamma = gamma, g.zeta = zeta, g.weight_one = weight_one;
    g.expected_slope = writable_or_null<scalar_t>(expected_slope);
    kernels::choose_hard_concrete(g);
  });
  return {r.index, r.count, r.weight, r.expected, r.slope, expected_slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gumbel_sigmoid_select_cpu(
    const Tensor& logits, const OptionalTensor& uniform, const Tensor& progress, bool training,
    bool run_all, double hard_from, double temperature) {
  const auto type = logits.scalar_type();
  const auto scores = logits.contiguous();
  OptionalTensor drawn;
  if (training && uniform) {
    drawn = contiguous_as(*uniform, type);
    TORCH_CHECK_VALUE(drawn->sizes() == scores.sizes(), "uniform must have shape ", scores.sizes(),
                      ", got ", drawn->sizes());
  }
  GateResults r(scores, training);
  const Progress now(progress);
  HEADWISE_DISPATCH_SUMS(type, [&] {
    check_finite<scalar_t>(scores);
    kernels::GumbelSigmoidChoice<scalar_t> g{};
    r.write_to(g, scores);
    g.uniform = data_or_null<scalar_t>(drawn);
    g.training = training, g.run_all = run_all, g.hard = training && now.reached(hard_from);
    g.temperature = temperature;
    kernels::choose_gumbel_sigmoid(g);
  });
  return {r.index, r.count, r.weight, r.expected, r.slope};
}

std::tuple<Tensor, Tensor> choice_backward_cpu(const OptionalTensor& grad_weight,
                                               const OptionalTensor& grad_expected,
                                               const Tensor& slope,
                                               const OptionalTensor& expected_slope,
                                               const OptionalTensor& share) {
  const auto& shaped = grad_weight ? *grad_weight : slope;
  TORCH_CHECK_VALUE(shaped.dim() == 2 && (grad_expected || grad_weight),
                    "grad_weight or grad_expected must be given, and slope have shape [B, H], got ",
                    slope.sizes());
  const auto type = slope.scalar_type();
  const auto B = shaped.size(0), H = shaped.size(1);
  check_shape("grad_expected", grad_expected, {B});
  check_wanted("slope", slope, {B, H});
  check_wanted("expected_slope", expected_slope, {B, H});
  check_wanted("share", share, {B});
  const auto slopes = slope.contiguous();
  OptionalTensor expected_slopes, shares;
  if (expected_slope) expected_slopes = contiguous_as(*expected_slope, type);
  if (share) shares = contiguous_as(*share, type);
  OptionalTensor weight, expected;
  if (grad_weight) weight = contiguous_as(*grad_weight, type);
  if (grad_expected) expected = contiguous_as(*grad_expected, type);
  auto scores = at::empty({B, H}, slope.options());
  auto budget = share ? at::empty({B}, slope.options()) : at::empty({0}, slope.options());
  HEADWISE_DISPATCH_SUMS(type, [&] {
    kernels::choice_backward<scalar_t>(
        {B, H, data_or_null<scalar_t>(weight), data_or_null<scalar_t>(expected),
         data_or_null<scalar_t>(slopes), data_or_null<scalar_t>(expected_slopes),
         data_or_null<scalar_t>(shares), scores.template mutable_data_ptr<scalar_t>(),
         writable_or_null<scalar_t>(budget)});
  });
  return {scores, budget};
}

std::tuple<Tensor, Tensor> input_relevance_cpu(const Tensor& features, const Tensor& base,
                                               const Tensor& weight, const Tensor& progress,
                                               bool training, double static_until) {
  const auto type = features.scalar_type();
  const WithoutAutocast exact;
  const bool open = !training || Progress(progress).reached(static_until);
  const double scale = open ? 1.0 / std::sqrt(static_cast<double>(weight.size(1))) : 0.0;
  const auto first = base.to(type), factor = weight.to(type).t();
  // Held at zero, what is not finite is NaN: the choice then names it.
  const auto relevance = open ? at::addmm(first, features, factor, 1, scale)
                              : at::mm(features, factor).mul_(0.0).add_(first);
  return {relevance, at::scalar_tensor(scale, at::kDouble)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_budget_cpu(
    const Tensor& features, const Tensor& hidden_weight, const Tensor& hidden_bias,
    const Tensor& out_weight, const Tensor& out_bias, const Tensor& progress, bool training,
    double min_budget, double max_budget, double keep, double initial_keep, double warmup,
    double static_until) {
  const WithoutAutocast exact;
  const auto type = features.scalar_type();
  const Progress now(progress);
  const bool open = !training || now.reached(static_until);
  TORCH_CHECK_VALUE(features.dim() == 2 && hidden_weight.dim() == 2,
                    "features and hidden_weight must have shapes [B, F] and [h, F], got ",
                    features.sizes(), " and ", hidden_weight.sizes());
  const auto B = features.size(0), hidden_units = hidden_weight.size(0);
  check_shape("hidden_weight", hidden_weight, {hidden_units, features.size(1)});
  check_shape("hidden_bias", hidden_bias, {hidden_units});
  check_shape("out_weight", out_weight, {1, hidden_units});
  TORCH_CHECK_VALUE(out_bias.numel() == 1, "out_bias must have one element, got shape ",
                    out_bias.sizes());
  const double scale = 1.0 / std::sqrt(static_cast<double>(hidden_weight.size(1)));
  const auto hidden = at::addmm(hidden_bias.to(type), features, hidden_weight.to(type).t(), 1,
                                scale);  // [B, h]
  const auto out = contiguous_as(out_weight, type), bias = contiguous_as(out_bias, type);
  auto budget = at::empty({B}, features.options()), asked = at::empty({B}, features.options());
  HEADWISE_DISPATCH_SUMS(type, [&] {
    const auto* units = hidden.const_data_ptr<scalar_t>();
    const auto* factor = out.const_data_ptr<scalar_t>();
    for (int64_t b = 0; b < B; ++b, units += hidden_units) {
      scalar_t logit = 0;
      for (int64_t i = 0; i < hidden_units; ++i) logit += kernels::gelu(units[i]) * factor[i];
      logit *= open ? scalar_t(1) : scalar_t(0);
      logit += bias.const_data_ptr<scalar_t>()[0];
      asked.mutable_data_ptr<scalar_t>()[b] =
          kernels::budget_of_logit<scalar_t>(logit, static_cast<scalar_t>(now.value), warmup,
                                             warmup_start(initial_keep, keep), 0.0, 1.0);
    }
    const auto* from = asked.const_data_ptr<scalar_t>();
    for (int64_t b = 0; b < B; ++b)
      budget.mutable_data_ptr<scalar_t>()[b] =
          from[b] < static_cast<scalar_t>(min_budget)   ? static_cast<scalar_t>(min_budget)
          : from[b] > static_cast<scalar_t>(max_budget) ? static_cast<scalar_t>(max_budget)
                                                        : from[b];
  });
  return {budget, asked, hidden, at::scalar_tensor(open ? scale : 0.0, at::kDouble)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_budget_backward_cpu(
    const OptionalTensor& grad_budget, const OptionalTensor& grad_asked, const Tensor& features,
    const Tensor& out_weight, const Tensor& asked, const Tensor& hidden, const Tensor& scale,
    double min_budget, double max_budget) {
  const WithoutAutocast exact;
  const auto type = features.scalar_type();
  TORCH_CHECK_VALUE(features.dim() == 2 && hidden.dim() == 2,
                    "features and hidden must have shapes [B, F] and [B, h], got ",
                    features.sizes(), " and ", hidden.sizes());
  const auto B = hidden.size(0), units = hidden.size(1);
  check_shape("features", features, {B, features.size(1)});
  check_shape("out_weight", out_weight, {1, units});
  check_shape("asked", asked, {B});
  check_shape("grad_budget", grad_budget, {B});
  check_shape("grad_asked", grad_asked, {B});
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got shape ", scale.sizes());
  const double factor = scale.item<double>();  // 0 while the network's answer is held back
  OptionalTensor from_budget, from_asked;
  if (grad_budget) from_budget = contiguous_as(*grad_budget, type);
  if (grad_asked) from_asked = contiguous_as(*grad_asked, type);
  const auto out = contiguous_as(out_weight, type), shares = contiguous_as(asked, type);
  const auto inner = contiguous_as(hidden, type);
  auto grad_hidden = at::empty_like(inner);  // of the units before their activation
  auto grad_out = at::zeros({1, units}, inner.options());
  auto grad_bias = at::zeros({1}, inner.options());
  HEADWISE_DISPATCH_SUMS(type, [&] {
    const auto low = static_cast<scalar_t>(min_budget), high = static_cast<scalar_t>(max_budget);
    const auto* const values = shares.const_data_ptr<scalar_t>();
    const auto* const before = inner.const_data_ptr<scalar_t>();
    const auto* const weights = out.const_data_ptr<scalar_t>();
    auto* const to_hidden = grad_hidden.mutable_data_ptr<scalar_t>();
    auto* const to_out = grad_out.mutable_data_ptr<scalar_t>();
    for (int64_t b = 0; b < B; ++b) {
      const auto share = values[b];
      scalar_t grad = from_asked ? data_or_null<scalar_t>(from_asked)[b] : scalar_t(0);
      if (from_budget && !(share < low) && !(share > high))
        grad += data_or_null<scalar_t>(from_budget)[b];
      grad *= share * (1 - share);
      grad_bias.mutable_data_ptr<scalar_t>()[0] += grad;
      if (factor == 0) grad = 0;
      for (int64_t i = 0; i < units; ++i) {
        const auto unit = kernels::gelu_with_slope(before[b * units + i]);
        to_out[i] += grad * unit.value;
        to_hidden[b * units + i] = grad * weights[i] * unit.slope;
      }
    }
  });
  auto grad_weight = at::mm(grad_hidden.t(), features).mul_(factor);
  return {grad_weight, grad_hidden.sum(0), grad_out, grad_bias};
}

Tensor learn_features_cpu(const Tensor& x, const OptionalTensor& key_padding_mask, Tensor mean,
                          Tensor variance, Tensor batches) {
  const auto type = x.scalar_type(), kept_type = mean.scalar_type();
  const auto sums = type == at::kDouble ? at::kDouble : at::kFloat;
  const auto& mask = key_padding_mask;
  const bool plain_statistics =
      (kept_type == sums || (kept_type == at::kBFloat16 && sums == at::kFloat)) &&
      variance.scalar_type() == kept_type && batches.scalar_type() == at::kFloat &&
      batches.numel() == 1 && x.dim() == 3 && x.size(2) > 0 &&
      mean.sizes() == at::IntArrayRef({x.size(2)}) && variance.sizes() == mean.sizes();
  const bool plain_mask =
      !mask || ((mask->scalar_type() == at::kBool || at::isFloatingType(mask->scalar_type())) &&
                mask->sizes() == at::IntArrayRef({x.size(0), x.size(1)}));
  if (x.layout() != at::kStrided || !at::isFloatingType(type) || !plain_statistics || !plain_mask)
    return learn_features_composed(x, mask, mean, variance, batches);
  auto features = at::empty({x.size(0), x.size(2)}, x.options().dtype(sums));  // [B, D]
  std::vector<Tensor> kept;
  kept.reserve(2);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "learn_features", [&] {
    kernels::PooledInput<scalar_t> in;
    read_input(in, x, mask, kept);
    kernels::pool_features(
        in, features.template mutable_data_ptr<typename kernels::PooledInput<scalar_t>::C>());
  });
  auto means = contiguous_as(mean, sums), variances = contiguous_as(variance, sums);
  HEADWISE_DISPATCH_SUMS(sums, [&] {
    auto* const rows = features.mutable_data_ptr<scalar_t>();
    auto *const m = means.mutable_data_ptr<scalar_t>(), *const v =
                                                            variances.mutable_data_ptr<scalar_t>();
    if (!recomputing()) {
      kernels::learn_statistics(rows, x.size(0), x.size(2), m, v,
                                batches.mutable_data_ptr<float>());
      if (!means.is_same(mean)) mean.copy_(means);
      if (!variances.is_same(variance)) variance.copy_(variances);
    }
    kernels::standardize(rows, x.size(0), x.size(2), m, v);
  });
  return features;
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("_budget_select", budget_select_cpu);
  m.impl("_hard_concrete_select", hard_concrete_select_cpu);
  m.impl("_gumbel_sigmoid_select", gumbel_sigmoid_select_cpu);
  m.impl("_choice_backward", choice_backward_cpu);
  m.impl("_input_relevance", input_relevance_cpu);
  m.impl("_head_budget", head_budget_cpu);
  m.impl("_head_budget_backward", head_budget_backward_cpu);
  m.impl("learn_features", learn_features_cpu);
}

#undef HEADWISE_DISPATCH_SUMS

}  // namespace
}  // namespace headwise::ops

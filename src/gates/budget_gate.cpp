// The module of BudgetGate; its formulas are in budget.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>

#include "gates/helpers.h"
#include "headwise/gates.h"
#include "ops/gates/budget.h"

namespace headwise {

BudgetGateImpl::BudgetGateImpl(BudgetGateOptions options_, int64_t embed_dim, int64_t num_heads,
                               const at::TensorOptions& tensor_options)
    : CloneableGate(options_, "squared", options_.strength(), embed_dim, num_heads, tensor_options),
      options(std::move(options_)) {
  fixed_budget_ = options.budget();
  if (!fixed_budget_ && options.keep() == 1.0) {
    fixed_budget_ = 1.0;
  }
  build_features(tensor_options);
  base = register_parameter("base", torch::empty({num_heads}, tensor_options));
  relevance =
      register_module("relevance", make_linear(embed_dim, num_heads, false, tensor_options));
  if (!fixed_budget_) {
    const auto hidden = options.hidden_dim().value_or(std::max<int64_t>(8, embed_dim / 8));
    budget_hidden =
        register_module("budget_hidden", make_linear(embed_dim, hidden, true, tensor_options));
    budget_out = register_module("budget_out", make_linear(hidden, 1, true, tensor_options));
  }
  reset_parameters();
}

void BudgetGateImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  progress.zero_();
  reset_features();
  base.normal_(0.0, 0.01);
  relevance->weight.zero_();
  if (!fixed_budget_) {
    budget_hidden->weight.normal_();
    budget_hidden->bias.zero_();
    budget_out->weight.zero_();
    set_budget(options.keep());
  }
}

void BudgetGateImpl::set_budget(double budget) {
  const double held =
      std::min({std::max({budget, options.min_budget(), 1e-3}), options.max_budget(), 1.0 - 1e-3});
  budget_out->bias.fill_(std::log(held / (1.0 - held)));
}

void BudgetGateImpl::start(const at::Tensor& relevance_, double budget) {
  base.copy_(relevance_);
  if (!fixed_budget_) {
    set_budget(budget);
  }
}

Selection BudgetGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const bool training = is_training();
  if (!training && options.kept_weight() == "one") {
    const bool fixed = fixed_budget_.has_value();
    const auto [index, count, weight, scores, budget] = evaluate_budget_gate(
        x, optional(key_padding_mask), feature_mean, feature_variance, base, relevance->weight,
        fixed ? std::nullopt : optional(budget_hidden->weight),
        fixed ? std::nullopt : optional(budget_hidden->bias),
        fixed ? std::nullopt : optional(budget_out->weight),
        fixed ? std::nullopt : optional(budget_out->bias), progress, fixed_budget_.value_or(1.0),
        options.min_budget(), options.max_budget(), options.keep(), options.initial_keep(),
        options.warmup(), options.min_heads(), options.rounding());
    return {index, count, weight, scores, budget};
  }
  const auto z = features(x, key_padding_mask);  // [B, D]
  const auto scores = input_relevance(z, base, relevance->weight, progress, training,
                                      options.static_until());  // [B, H]
  at::Tensor budget, asked;                                     // [B]
  if (fixed_budget_) {
    budget = torch::full({x.size(0)}, *fixed_budget_, z.options().requires_grad(false));
  } else {
    std::tie(budget, asked) = head_budget(
        z, budget_hidden->weight, budget_hidden->bias, budget_out->weight, budget_out->bias,
        progress, training, options.min_budget(), options.max_budget(), options.keep(),
        options.initial_keep(), options.warmup(), options.static_until());
  }
  std::optional<at::Tensor> noise;
  if (training && options.noise_scale() > 0.0) {
    noise = options.noise() == "normal" ? torch::randn_like(scores)
                                        : gumbel_noise(torch::rand_like(scores));
  }
  const auto [index, count, weight, expected] =
      budget_select(scores, budget, progress, noise, training, run_all(), options.temperature(),
                    options.final_temperature(), options.noise_scale(), options.hard_from(),
                    options.relaxation() == "straight_through", options.kept_weight() == "soft",
                    options.min_heads(), options.rounding());
  if (records()) {
    expected_heads = expected;
    regulariser = at::Tensor();
    if (asked.defined() && options.bounds_strength() > 0.0) {
      regulariser = options.bounds_strength() *
                    budget_bounds(asked, options.min_budget(), options.max_budget());
    }
    if (options.entropy_strength() != 0.0) {
      const auto entropy =
          (2.0 * progress - 1.0) * options.entropy_strength() * relevance_entropy(scores);
      regulariser = regulariser.defined() ? regulariser + entropy : entropy;
    }
  }
  return {index, count, weight.to(x.scalar_type()), scores, budget};
}

}  // namespace headwise

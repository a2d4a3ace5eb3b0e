// The module of RequestedBudgetGate; its formulas are in requested.cpp and budget.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>

#include "gates/helpers.h"
#include "gates/scope.h"
#include "headwise/gates.h"
#include "ops/gates/budget.h"
#include "ops/gates/requested.h"

namespace headwise {

RequestedBudgetGateImpl::RequestedBudgetGateImpl(RequestedBudgetGateOptions options_,
                                                 int64_t embed_dim, int64_t num_heads,
                                                 const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads, tensor_options), options(std::move(options_)) {
  build_features(tensor_options);
  base = register_parameter("base", torch::empty({num_heads}, tensor_options));
  tilt = register_parameter("tilt", torch::empty({num_heads}, tensor_options));
  relevance =
      register_module("relevance", make_linear(embed_dim, num_heads, false, tensor_options));
  reset();
  set_scope(options.scope(), options);
}

void RequestedBudgetGateImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  progress.zero_();
  reset_features();
  base.normal_(0.0, 0.01);
  tilt.zero_();
  relevance->weight.zero_();
}

void RequestedBudgetGateImpl::reset() {
  ScopedGateImpl::reset();
  requested_ = torch::full({}, options.budget(), at::kDouble);
}

void RequestedBudgetGateImpl::take_state(const GateImpl& original) {
  ScopedGateImpl::take_state(original);
  requested_ = static_cast<const RequestedBudgetGateImpl&>(original).requested_.clone();
}

void RequestedBudgetGateImpl::start(const at::Tensor& relevance_, double) {
  base.copy_(relevance_);
}

void RequestedBudgetGateImpl::contribute(GateScope& scope) const {
  scope.scores.push_back(base);
  scope.tilts.push_back(tilt);
}

void RequestedBudgetGateImpl::request(const at::Tensor& budget) {
  TORCH_CHECK_VALUE(budget.dim() <= 1 && budget.is_floating_point(),
                    "budget must be floating, of shape [] or [B], got ", budget.scalar_type(), " ",
                    budget.sizes());
  const auto fits = at::logical_and(budget.gt(0), budget.le(1));
  TORCH_CHECK_VALUE(
      fits.all().item<bool>(), "budget must be in (0, 1], got ",
      budget.reshape({-1}).masked_select(fits.reshape({-1}).logical_not())[0].item<double>());
  requested_ = budget.detach().clone();
}

Selection RequestedBudgetGateImpl::forward(const at::Tensor& x,
                                           const at::Tensor& key_padding_mask) {
  check_input(x);
  auto& shared = scope();
  const bool training = is_training();
  const int64_t batch = x.size(0);
  const auto z = features(x, key_padding_mask);  // [B, D]
  const auto floats = z.options().requires_grad(false);
  const auto share_out = [&](const at::Tensor& budget) {  // [R] -> [R, N]
    return allocate_budget(at::cat(shared.scores), at::cat(shared.tilts), budget, progress,
                           training, options.temperature(), options.final_temperature(),
                           options.hard_from());
  };
  at::Tensor budget, given;  // [B] or [1]; [B or 1, N]
  if (training) {
    using Tensors = GateScope::Tensors;
    const auto drawn = shared.draw(
        position(), z, [&]() -> Tensors { return {torch::rand({batch}, floats)}; },
        [&](const Tensors& uniform) -> Tensors {
          const auto asked =
              uniform[0] * (options.max_budget() - options.min_budget()) + options.min_budget();
          return {asked, share_out(asked)};
        });
    budget = drawn[0];
    given = drawn[1];
  } else {
    budget = requested_.to(floats.device(), z.scalar_type()).reshape({-1});
    given = share_out(budget);
  }
  TORCH_CHECK_VALUE(budget.size(0) == 1 || budget.size(0) == batch,
                    "budget must be one for all sequences or one for each of the ", batch, ", got ",
                    budget.size(0));
  const auto own = given.narrow(1, shared.start(position()), num_heads());  // [B or 1, H]
  // [B]: the share of this layer's heads that the choice among all layers includes.
  const auto share = (own.detach().sum(1) / static_cast<double>(std::max<int64_t>(num_heads(), 1)))
                         .expand({batch});
  const auto scores =
      input_relevance(z, base, relevance->weight, progress, training, options.static_until()) +
      tilt.to(z.scalar_type()) * (budget.unsqueeze(1) - 0.5);  // [B, H]
  std::optional<at::Tensor> noise;
  if (training && options.noise_scale() > 0.0) {
    noise = gumbel_noise(torch::rand_like(scores));
  }
  auto [index, count, weight, expected] = budget_select(
      scores, share, progress, noise, training, run_all(), options.temperature(),
      options.final_temperature(), options.noise_scale(), options.hard_from(),
      /*straight_through=*/false, /*soft_weight=*/false, options.min_heads(), "round");
  if (training) {
    if (records()) expected_heads = expected;
    // Zeros that carry the gradient of the choice among layers.
    weight = weight + (own - own.detach());
  }
  return {index, count, weight.to(x.scalar_type()), scores, budget.expand({batch})};
}

}  // namespace headwise

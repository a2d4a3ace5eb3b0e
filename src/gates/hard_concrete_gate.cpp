// The module of HardConcreteGate; its formulas are in hard_concrete.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <cmath>

#include "gates/budget.h"
#include "gates/checks.h"
#include "gates/hard_concrete.h"
#include "headwise/gates.h"

namespace headwise {

HardConcreteGateImpl::HardConcreteGateImpl(HardConcreteGateOptions options_, int64_t embed_dim,
                                           int64_t num_heads,
                                           const at::TensorOptions& tensor_options)
    : TargetedGateImpl(
          {"HardConcreteGate", options_.target_scope(), options_.penalty(), options_.target(),
           options_.initial_target(), options_.warmup(), options_.strength()},
          options_.static_until(), options_.hard_from(), embed_dim, num_heads, options_.execution(),
          tensor_options),
      options(std::move(options_)) {
  check_choice("penalty", options.penalty(), {"squared", "lagrangian", "l0"});
  check_choice("kept_weight", options.kept_weight(), {"gate", "one"});
  check_positive("beta", options.beta());
  TORCH_CHECK_VALUE(options.gamma() < 0.0 && options.zeta() > 1.0,
                    "gamma must be below 0 and zeta above 1, got ", options.gamma(), " and ",
                    options.zeta());
  TORCH_CHECK_VALUE(std::isfinite(options.init_log_alpha()), "init_log_alpha must be finite, got ",
                    options.init_log_alpha());
  log_alpha = register_parameter("log_alpha", torch::empty({num_heads}, tensor_options));
  if (options.input_dependent()) {
    build_features(tensor_options);
    relevance =
        register_module("relevance", make_linear(embed_dim, num_heads, false, tensor_options));
  }
  if (options.penalty() == "lagrangian") {
    multipliers = register_parameter("multipliers", torch::empty({2}, tensor_options));
  }
  reset_parameters();
}

void HardConcreteGateImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  progress.zero_();
  log_alpha.normal_(options.init_log_alpha(), 0.01);
  if (options.input_dependent()) {
    reset_features();
    relevance->weight.zero_();
  }
  if (multipliers.defined()) {
    multipliers.zero_();
  }
}

void HardConcreteGateImpl::start(const at::Tensor& relevance_, double) {
  // P(open) is 1/2 where the relevance is 0.
  log_alpha.copy_(relevance_ + options.beta() * std::log(-options.gamma() / options.zeta()));
}

Selection HardConcreteGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const bool training = is_training();
  const auto scores =
      options.input_dependent()
          ? relevance_of(x, key_padding_mask, log_alpha, relevance->weight, options.static_until())
          : static_relevance(log_alpha, x);  // [B, H]
  std::optional<at::Tensor> uniform;
  if (training && options.kept_weight() == "gate") {
    uniform = torch::rand_like(scores);
  }
  const auto [index, count, weight, expected] = hard_concrete_select(
      scores, uniform, progress, training, run_all(), options.hard_from(), options.beta(),
      options.gamma(), options.zeta(), options.kept_weight() == "one");
  if (training) {
    expected_heads = expected;
  }
  return {index, count, weight.to(x.scalar_type()), scores, {}};
}

}  // namespace headwise

// The module of HardConcreteGate; its formulas are in hard_concrete.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <cmath>

#include "gates/helpers.h"
#include "headwise/gates.h"
#include "ops/gates/budget.h"
#include "ops/gates/hard_concrete.h"

namespace headwise {

HardConcreteGateImpl::HardConcreteGateImpl(HardConcreteGateOptions options_, int64_t embed_dim,
                                           int64_t num_heads,
                                           const at::TensorOptions& tensor_options)
    : CloneableGate(options_, options_.penalty(),
                    options_.strength().value_or(options_.penalty() == "l0" ? 0.1 : 20.0),
                    embed_dim, num_heads, tensor_options),
      options(std::move(options_)) {
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
    uniform = torch::rand_like(options.noise_per() == "batch" ? scores.slice(0, 0, 1) : scores);
  }
  const auto [index, count, weight, expected] = hard_concrete_select(
      scores, uniform, progress, training, run_all(), options.hard_from(), options.beta(),
      options.gamma(), options.zeta(), options.kept_weight() == "one");
  if (records()) {
    expected_heads = expected;
  }
  return {index, count, weight.to(x.scalar_type()), scores, {}};
}

}  // namespace headwise

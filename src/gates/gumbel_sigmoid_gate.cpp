// The module of GumbelSigmoidGate; its formulas are in gumbel_sigmoid.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include "gates/helpers.h"
#include "headwise/gates.h"
#include "ops/gates/budget.h"
#include "ops/gates/gumbel_sigmoid.h"

namespace headwise {

GumbelSigmoidGateImpl::GumbelSigmoidGateImpl(GumbelSigmoidGateOptions options_, int64_t embed_dim,
                                             int64_t num_heads,
                                             const at::TensorOptions& tensor_options)
    : CloneableGate(options_, options_.penalty(),
                    options_.strength().value_or(options_.penalty() == "adavit" ? 2.0 : 20.0),
                    embed_dim, num_heads, tensor_options),
      options(std::move(options_)) {
  build_features(tensor_options);
  logit = register_parameter("logit", torch::empty({num_heads}, tensor_options));
  relevance =
      register_module("relevance", make_linear(embed_dim, num_heads, false, tensor_options));
  reset_parameters();
}

void GumbelSigmoidGateImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  progress.zero_();
  reset_features();
  logit.normal_(options.init_logit(), 0.01);
  relevance->weight.zero_();
}

void GumbelSigmoidGateImpl::start(const at::Tensor& relevance_, double) { logit.copy_(relevance_); }

Selection GumbelSigmoidGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const bool training = is_training();
  const auto logits = relevance_of(x, key_padding_mask, logit, relevance->weight,
                                   options.static_until());  // [B, H]
  std::optional<at::Tensor> uniform;
  if (training) {
    uniform = torch::rand_like(logits);
  }
  const auto [index, count, weight, expected] = gumbel_sigmoid_select(
      logits, uniform, progress, training, run_all(), options.hard_from(), options.temperature());
  if (records()) {
    expected_heads = expected;
    if (options.penalty() == "adavit") {
      const auto& t = target();
      regulariser = gumbel_sigmoid_regulariser(logits, weight, progress, t.keep, t.initial_keep,
                                               t.warmup, t.strength);
    }
  }
  return {index, count, weight.to(x.scalar_type()), logits, {}};
}

}  // namespace headwise

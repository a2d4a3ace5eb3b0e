// The module of SubsetGate; its formulas are in subset.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>

#include "gates/helpers.h"
#include "gates/scope.h"
#include "headwise/gates.h"
#include "ops/gates/budget.h"
#include "ops/gates/selection_ops.h"
#include "ops/gates/subset.h"

namespace headwise {

SubsetGateImpl::SubsetGateImpl(SubsetGateOptions options_, int64_t embed_dim, int64_t num_heads,
                               const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads, tensor_options), options(std::move(options_)) {
  scores = register_parameter("scores", torch::empty({num_heads}, tensor_options));
  reset_parameters();
  set_scope(options.scope(), options);
}

void SubsetGateImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  progress.zero_();
  scores.normal_(0.0, 0.01);
}

void SubsetGateImpl::start(const at::Tensor& relevance, double) { scores.copy_(relevance); }

void SubsetGateImpl::contribute(GateScope& scope) const { scope.scores.push_back(scores); }

void SubsetGateImpl::join(const std::shared_ptr<GateScope>& scope, int64_t position) {
  const int64_t heads = scope->num_heads();
  TORCH_CHECK_VALUE(!options.k() || *options.k() <= heads, "k must be in 1..", heads, ", got ",
                    options.k().value_or(0));
  const auto rounded =
      static_cast<int64_t>(std::floor(options.keep() * static_cast<double>(heads) + 0.5));
  k_ = options.k().value_or(std::clamp<int64_t>(rounded, std::min<int64_t>(1, heads), heads));
  ScopedGateImpl::join(scope, position);
}

void SubsetGateImpl::take_state(const GateImpl& original) {
  ScopedGateImpl::take_state(original);
  k_ = static_cast<const SubsetGateImpl&>(original).k_;
}

Selection SubsetGateImpl::forward(const at::Tensor& x, const at::Tensor&) {
  check_input(x);
  auto& shared = scope();
  const bool training = is_training();
  using Tensors = GateScope::Tensors;
  const auto sample = [&]() -> Tensors {
    if (options.estimator() != "gumbel") return {};
    return {gumbel_noise(torch::rand({shared.num_heads()},
                                     scores.options().dtype(at::kDouble).requires_grad(false)))};
  };
  const auto weigh = [&](const Tensors& noise) -> Tensors {
    return {subset_weight(at::cat(shared.scores), noise.empty() ? std::nullopt : optional(noise[0]),
                          progress, k_, training, options.temperature(),
                          options.final_temperature(), options.cooled_at(), options.hard_from())};
  };
  at::Tensor row = scores.detach();  // [H]
  if (num_heads() > 0) {
    const auto all = training ? shared.draw(position(), x, sample, weigh) : weigh({});
    row = all[0].narrow(0, shared.start(position()), num_heads());
  }
  const auto weight = row.to(x.scalar_type()).expand({x.size(0), -1});  // [B, H]
  const auto relevance = static_relevance(scores, x);                   // [B, H]
  if (records()) {
    expected_heads = row.sum().expand({x.size(0)});
  }
  if (training && run_all()) {
    auto all = select_all(x.size(0), num_heads(), weight.options().requires_grad(false));
    return {all.index, all.count, weight, relevance, {}};
  }
  const auto [index, count] = select_nonzero(weight);
  return {index, count, weight, relevance, {}};
}

}  // namespace headwise

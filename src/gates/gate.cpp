// Members that all gates share.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>

#include "gates/helpers.h"
#include "gates/model_gates.h"
#include "gates/options.h"
#include "gates/scope.h"
#include "headwise/gates.h"
#include "module_copy.h"
#include "ops/gates/budget.h"
#include "ops/gates/hard_concrete.h"
#include "recomputation.h"

namespace headwise {

torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias,
                              const at::TensorOptions& tensors) {
  // Linear's own initialisation divides by its width.
  torch::nn::Linear linear(
      torch::nn::LinearOptions(std::max<int64_t>(in, 1), std::max<int64_t>(out, 1)).bias(bias));
  linear->to(tensors.device(), c10::typeMetaToScalarType(tensors.dtype()));
  if (in == 0 || out == 0) {
    linear->options.in_features(in).out_features(out);
    linear->weight.set_data(torch::empty({out, in}, tensors));
    if (bias && out == 0) linear->bias.set_data(torch::empty({0}, tensors));
  }
  return linear;
}

namespace {

std::string type_of(const GateOptions& options) {
  return std::visit([](const auto& typed) { return std::string(typed.kType); }, options);
}

bool runs_all(const GateOptions& options) {
  return std::visit(
      []<typename Options>(const Options& typed) {
        if constexpr (requires { typed.execution(); }) {
          return typed.execution() == "all";
        } else {  // the inner gate's
          return typed.gate().get() == nullptr || runs_all(typed.gate().get()->options);
        }
      },
      options);
}

}  // namespace

GateImpl::GateImpl(const GateOptions& options, int64_t embed_dim, int64_t num_heads)
    : GateImpl("headwise::" + type_of(options), embed_dim, num_heads, runs_all(options)) {
  check_gate_options(options);
}

GateImpl::GateImpl(std::string name, int64_t embed_dim, int64_t num_heads, bool run_all)
    : torch::nn::Module(std::move(name)),
      embed_dim_(embed_dim),
      num_heads_(num_heads),
      run_all_(run_all) {
  TORCH_CHECK_VALUE(embed_dim > 0 && num_heads >= 0,
                    "embed_dim must be positive and num_heads not negative, got embed_dim=",
                    embed_dim, " and num_heads=", num_heads);
}

void GateImpl::check_input(const at::Tensor& x) const {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == embed_dim_, "x must have shape [B, L, ",
                    embed_dim_, "], got ", x.sizes());
}

bool GateImpl::records() const { return is_training() && !recomputing(); }

at::Tensor GateImpl::penalty() const { return {}; }

void GateImpl::reset() {
  reset_parameters();
  expected_heads = at::Tensor();
}

void GateImpl::copy_to(GateImpl& copy, const std::optional<torch::Device>& device) const {
  copy_tensors(*this, copy, device);
  copy.take_state(*this);
  for (const auto& child : named_modules("", /*include_self=*/false)) {
    if (const auto* inner = dynamic_cast<const GateImpl*>(child.value().get())) {
      const auto own = copy.named_modules("", false)[child.key()];
      dynamic_cast<GateImpl&>(*own).take_state(*inner);
    }
  }
}

void GateImpl::take_state(const GateImpl&) {}

void GateImpl::print(std::ostream& stream, const GateOptions& options) const {
  stream << name() << "(embed_dim=" << embed_dim_ << ", num_heads=" << num_heads_
         << changed_options(options) << ")";
}

Selection GateImpl::forward_heads(const HeadInputs&) {
  TORCH_CHECK(false, "this gate does not read queries and keys");
}

at::Tensor GateImpl::attend(const HeadInputs&, const at::Tensor&) {
  TORCH_CHECK(false, "this gate does not change how heads attend");
}

void GateImpl::start_from(const at::Tensor&, double) {
  TORCH_CHECK(false, "this gate has nothing to start from");
}

void GateImpl::contribute(GateScope&) const {}

void GateImpl::join(const std::shared_ptr<GateScope>&, int64_t) {}

void GateImpl::anneal(double progress) {
  TORCH_CHECK_VALUE(progress >= 0.0 && progress <= 1.0, "progress must be between 0 and 1, got ",
                    progress);
}

ScheduledGateImpl::ScheduledGateImpl(const GateOptions& options, int64_t embed_dim,
                                     int64_t num_heads, const at::TensorOptions& tensor_options)
    : GateImpl(options, embed_dim, num_heads), replay_(std::make_shared<Replay>()) {
  progress = register_buffer("progress", torch::zeros({}, tensor_options.dtype(at::kFloat)));
}

void ScheduledGateImpl::anneal(double value) {
  GateImpl::anneal(value);
  progress.fill_(value);
}

void ScheduledGateImpl::start_from(const at::Tensor& relevance, double budget) {
  TORCH_CHECK_VALUE(relevance.sizes() == at::IntArrayRef({num_heads()}),
                    "relevance must have shape [", num_heads(), "], got ", relevance.sizes());
  TORCH_CHECK_VALUE(at::isfinite(relevance).all().item<bool>(), "relevance must be finite");
  torch::NoGradGuard no_grad;
  start(relevance.to(progress.device()), budget);
}

void ScheduledGateImpl::build_features(const at::TensorOptions& tensors) {
  feature_mean = register_buffer("feature_mean", torch::zeros({embed_dim()}, tensors));
  feature_variance = register_buffer("feature_variance", torch::ones({embed_dim()}, tensors));
  feature_batches = register_buffer("feature_batches", torch::zeros({}, tensors.dtype(at::kFloat)));
}

void ScheduledGateImpl::reset_features() {
  feature_mean.zero_();
  feature_variance.fill_(1.0);
  feature_batches.zero_();
}

at::Tensor ScheduledGateImpl::features(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  const auto padding = optional(key_padding_mask);
  auto mean = feature_mean, variance = feature_variance;
  if (!is_training()) return standardize(gate_features(x, padding), mean, variance);
  const bool repeated = recomputing();
  if (repeated) {
    if (const auto* used = replay_->recall(gate_features(x, padding)))
      mean = used->tensors[0], variance = used->tensors[1];
  }
  auto learnt = learn_features(x, padding, mean, variance, feature_batches);
  if (!repeated && may_be_recomputed()) {
    replay_->remember(gate_features(x, padding), {{mean.clone(), variance.clone()}});
  }
  return learnt;
}

at::Tensor ScheduledGateImpl::relevance_of(const at::Tensor& x, const at::Tensor& key_padding_mask,
                                           const at::Tensor& base, const at::Tensor& weight,
                                           double static_until) {
  if (is_training()) {
    return input_relevance(features(x, key_padding_mask), base, weight, progress, true,
                           static_until);
  }
  return evaluate_relevance(x, optional(key_padding_mask), feature_mean, feature_variance, base,
                            weight, progress);
}

void ScopedGateImpl::set_scope(const std::string& scope, const GateOptions& options) {
  if (scope == "model") {
    key_ = gate_options_to_json(options);
    return;
  }
  const auto alone = std::make_shared<GateScope>();
  contribute(*alone);
  join(alone, 0);
}

void TargetedGateImpl::reset() {
  ScheduledGateImpl::reset();
  regulariser = at::Tensor();
}

void ScopedGateImpl::take_state(const GateImpl& original) {
  const auto& from = static_cast<const ScopedGateImpl&>(original);
  if (!from.scope_) return;
  GateScope own;
  contribute(own);
  position_ = from.position_;
  scope_ = from.scope_->copy_at(position_, own);
}

void ScopedGateImpl::join(const std::shared_ptr<GateScope>& scope, int64_t position) {
  scope_ = scope;
  position_ = position;
}

GateScope& ScopedGateImpl::scope() const {
  TORCH_CHECK(scope_ && scope_->complete(), name(),
              " has scope 'model' and is not linked with the other layers' gates: ",
              "call headwise::link_gates on the model");
  return *scope_;
}

at::Tensor TargetedGateImpl::penalty() const {
  return expected_heads.defined() ? penalty_of({const_cast<TargetedGateImpl*>(this)})
                                  : at::zeros({}, progress.options());
}

}  // namespace headwise

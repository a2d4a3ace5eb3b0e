#include <ATen/ATen.h>
#include <torch/nn/init.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "gates/budget.h"
#include "gates/hard_concrete.h"
#include "gates/selection_ops.h"
#include "headwise/gates.h"

namespace headwise {
namespace {

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

void check_fraction(const char* name, double value) {
  TORCH_CHECK_VALUE(value > 0.0 && value <= 1.0, name, " must be in (0, 1], got ", value);
}

void check_choice(const char* name, const std::string& value,
                  std::initializer_list<const char*> choices) {
  std::string listed;
  for (const char* choice : choices) {
    if (value == choice) return;
    listed += (listed.empty() ? "" : ", ") + std::string(choice);
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", listed, ", got '", value, "'");
}

void check_not_negative(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && std::isfinite(value), name,
                    " must be finite and not negative, got ", value);
}

torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias,
                              const at::TensorOptions& tensors) {
  // Linear's own initialisation divides by its width.
  torch::nn::Linear linear(torch::nn::LinearOptions(in, std::max<int64_t>(out, 1)).bias(bias));
  linear->to(tensors.device(), c10::typeMetaToScalarType(tensors.dtype()));
  if (out == 0) {
    linear->options.out_features(0);
    linear->weight.set_data(torch::empty({0, in}, tensors));
  }
  return linear;
}

}  // namespace

GateImpl::GateImpl(std::string name, int64_t embed_dim, int64_t num_heads,
                   const std::string& execution)
    : torch::nn::Module(std::move(name)),
      embed_dim_(embed_dim),
      num_heads_(num_heads),
      run_all_(execution == "all") {
  check_choice("execution", execution, {"all", "selected"});
  TORCH_CHECK_VALUE(embed_dim > 0 && num_heads >= 0,
                    "embed_dim must be positive and num_heads not negative, got embed_dim=",
                    embed_dim, " and num_heads=", num_heads);
}

void GateImpl::check_input(const at::Tensor& x) const {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == embed_dim_, "x must have shape [B, L, ",
                    embed_dim_, "], got ", x.sizes());
}

at::Tensor GateImpl::penalty() const { return at::zeros({}); }

void GateImpl::anneal(double progress) {
  TORCH_CHECK_VALUE(progress >= 0.0 && progress <= 1.0, "progress must be between 0 and 1, got ",
                    progress);
}

FixedGateImpl::FixedGateImpl(FixedGateOptions options_, int64_t embed_dim, int64_t num_heads,
                             const at::TensorOptions& tensor_options)
    : GateImpl("headwise::FixedGate", embed_dim, num_heads, options_.execution()),
      options(std::move(options_)) {
  TORCH_CHECK_VALUE(!(options.heads() && options.scale()),
                    "heads and scale must not both be given");
  scale = register_buffer("scale", torch::empty({num_heads}, tensor_options));
  reset_parameters();
}

void FixedGateImpl::reset_parameters() {
  std::vector<double> initial(num_heads(), options.heads() ? 0.0 : 1.0);
  if (options.scale()) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(options.scale()->size()) == num_heads(),
                      "scale must have ", num_heads(), " values, got ", options.scale()->size());
    for (const double value : *options.scale()) {
      TORCH_CHECK_VALUE(std::isfinite(value), "scale must be finite, got ", value);
    }
    initial = *options.scale();
  } else if (options.heads()) {
    for (const int64_t head : *options.heads()) {
      TORCH_CHECK_VALUE(head >= 0 && head < num_heads(), "heads must be in 0..", num_heads() - 1,
                        ", got ", head);
      TORCH_CHECK_VALUE(initial[head] == 0.0, "heads must not name a head twice, got ", head,
                        " again");
      initial[head] = 1.0;
    }
  }
  scale.copy_(torch::tensor(initial, at::kDouble));
}

Selection FixedGateImpl::forward(const at::Tensor& x, const at::Tensor&) {
  check_input(x);
  const auto weight = scale.to(x.scalar_type()).expand({x.size(0), -1});  // [B, H]
  const auto [index, count] = select_nonzero(weight);
  return {index, count, weight, {}, {}};
}

RandomGateImpl::RandomGateImpl(RandomGateOptions options_, int64_t embed_dim, int64_t num_heads,
                               const at::TensorOptions& tensor_options)
    : GateImpl("headwise::RandomGate", embed_dim, num_heads, options_.execution()),
      options(std::move(options_)) {
  check_fraction("keep", options.keep());
  relevance = register_buffer("relevance", torch::empty({num_heads}, tensor_options));
  reset_parameters();
}

void RandomGateImpl::reset_parameters() { relevance.uniform_(); }

Selection RandomGateImpl::forward(const at::Tensor& x, const at::Tensor&) {
  check_input(x);
  const auto floats = x.options().dtype(at::kFloat).requires_grad(false);
  const auto scores = options.per_input()
                          ? torch::rand({x.size(0), num_heads()}, floats)
                          : relevance.to(at::kFloat).expand({x.size(0), -1});  // [B, H]
  const auto budget = torch::full({x.size(0)}, options.keep(), floats);        // [B]
  const auto count = budget_count(budget, num_heads(), 1, "round");
  const auto index = select_heads(scores, count);
  return {index, count, selection_mask(index, count, x.scalar_type()), scores, budget};
}

TargetedGateImpl::TargetedGateImpl(Target target, double static_until, double hard_from,
                                   int64_t embed_dim, int64_t num_heads,
                                   const std::string& execution,
                                   const at::TensorOptions& tensor_options)
    : GateImpl("headwise::" + target.type, embed_dim, num_heads, execution),
      target_(std::move(target)) {
  check_fraction("target", target_.target);
  check_fraction(target_.type == "BudgetGate" ? "initial_budget" : "initial_target",
                 target_.initial);
  check_choice("target_scope", target_.scope, {"model", "layer"});
  TORCH_CHECK_VALUE(target_.warmup >= 0.0 && target_.warmup <= 1.0,
                    "warmup must be between 0 and 1, got ", target_.warmup);
  TORCH_CHECK_VALUE(static_until >= 0.0 && static_until <= 1.0,
                    "static_until must be between 0 and 1, got ", static_until);
  TORCH_CHECK_VALUE(hard_from >= 0.0, "hard_from must not be negative, got ", hard_from);
  check_not_negative("strength", target_.strength);
  progress = register_buffer("progress", torch::zeros({}, tensor_options.dtype(at::kFloat)));
}

void TargetedGateImpl::anneal(double value) {
  GateImpl::anneal(value);
  progress.fill_(value);
}

at::Tensor TargetedGateImpl::penalty() const {
  if (!expected_heads.defined()) {
    return at::zeros({}, progress.options());
  }
  const auto term = target_penalty({expected_heads}, {num_heads()}, progress, target_.target,
                                   target_.initial, target_.warmup, target_.strength, target_.form,
                                   optional(multipliers_or_undefined()));
  return regulariser.defined() ? term + regulariser : term;
}

void TargetedGateImpl::build_features(const at::TensorOptions& tensors) {
  feature_mean = register_buffer("feature_mean", torch::zeros({embed_dim()}, tensors));
  feature_variance = register_buffer("feature_variance", torch::ones({embed_dim()}, tensors));
  feature_batches = register_buffer("feature_batches", torch::zeros({}, tensors.dtype(at::kFloat)));
}

void TargetedGateImpl::reset_features() {
  feature_mean.zero_();
  feature_variance.fill_(1.0);
  feature_batches.zero_();
}

at::Tensor TargetedGateImpl::features(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  const auto pooled = gate_features(x, optional(key_padding_mask));  // [B, D]
  if (is_training()) {
    const auto [mean, variance, batches] =
        update_statistics(pooled, feature_mean, feature_variance, feature_batches);
    feature_mean.copy_(mean);
    feature_variance.copy_(variance);
    feature_batches.copy_(batches);
  }
  return standardize(pooled, feature_mean, feature_variance);
}

BudgetGateImpl::BudgetGateImpl(BudgetGateOptions options_, int64_t embed_dim, int64_t num_heads,
                               const at::TensorOptions& tensor_options)
    : TargetedGateImpl({"BudgetGate", options_.target_scope(), "squared", options_.target(),
                        options_.initial_budget(), options_.warmup(), options_.strength()},
                       options_.static_until(), options_.hard_from(), embed_dim, num_heads,
                       options_.execution(), tensor_options),
      options(std::move(options_)) {
  if (options.budget()) {
    check_fraction("budget", *options.budget());
  }
  TORCH_CHECK_VALUE(
      0.0 < options.min_budget() && options.min_budget() <= options.max_budget() &&
          options.max_budget() <= 1.0,
      "min_budget and max_budget must satisfy 0 < min_budget <= max_budget <= 1, got ",
      options.min_budget(), " and ", options.max_budget());
  fixed_budget_ = options.budget();
  if (!fixed_budget_ && options.target() == 1.0) {
    fixed_budget_ = 1.0;
  }
  TORCH_CHECK_VALUE(fixed_budget_ || (options.min_budget() <= options.target() &&
                                      options.target() <= options.max_budget()),
                    "target must lie between min_budget=", options.min_budget(),
                    " and max_budget=", options.max_budget(), ", got ", options.target());
  check_choice("rounding", options.rounding(), {"round", "ceil"});
  check_choice("noise", options.noise(), {"gumbel", "normal"});
  check_choice("relaxation", options.relaxation(), {"exact_mass", "straight_through"});
  check_choice("kept_weight", options.kept_weight(), {"one", "soft"});
  for (const double value : {options.temperature(), options.final_temperature()}) {
    TORCH_CHECK_VALUE(value > 0.0 && std::isfinite(value),
                      "temperature and final_temperature must be positive and finite, got ", value);
  }
  check_not_negative("noise_scale", options.noise_scale());
  check_not_negative("bounds_strength", options.bounds_strength());
  TORCH_CHECK_VALUE(options.min_heads() >= 0, "min_heads must not be negative, got ",
                    options.min_heads());
  TORCH_CHECK_VALUE(!options.hidden_dim() || *options.hidden_dim() > 0,
                    "hidden_dim must be positive, got ", options.hidden_dim().value_or(0));

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
    const double held = std::min(
        {std::max({options.target(), options.min_budget(), 1e-3}), options.max_budget(), 1 - 1e-3});
    budget_out->bias.fill_(std::log(held / (1.0 - held)));
  }
}

Selection BudgetGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const bool training = is_training();
  if (!training && options.kept_weight() == "one") {
    const bool fixed = fixed_budget_.has_value();
    const auto given = [](const at::Tensor& t) {
      return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
    };
    const auto [index, count, weight, scores, budget] = evaluate_budget_gate(
        x, given(key_padding_mask), feature_mean, feature_variance, base, relevance->weight,
        fixed ? std::nullopt : given(budget_hidden->weight),
        fixed ? std::nullopt : given(budget_hidden->bias),
        fixed ? std::nullopt : given(budget_out->weight),
        fixed ? std::nullopt : given(budget_out->bias), progress, fixed_budget_.value_or(1.0),
        options.min_budget(), options.max_budget(), options.target(), options.initial_budget(),
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
        progress, training, options.min_budget(), options.max_budget(), options.target(),
        options.initial_budget(), options.warmup(), options.static_until());
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
  if (training) {
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
  TORCH_CHECK_VALUE(options.beta() > 0.0, "beta must be positive, got ", options.beta());
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

Selection HardConcreteGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const bool training = is_training();
  const auto scores =
      options.input_dependent()
          ? input_relevance(features(x, key_padding_mask), log_alpha, relevance->weight, progress,
                            training, options.static_until())
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

std::shared_ptr<GateImpl> make_gate(const GateOptions& options, int64_t embed_dim,
                                    int64_t num_heads, const at::TensorOptions& tensor_options) {
  struct Make {
    int64_t D, H;
    const at::TensorOptions& tensors;
    std::shared_ptr<GateImpl> operator()(const FixedGateOptions& o) const {
      return std::make_shared<FixedGateImpl>(o, D, H, tensors);
    }
    std::shared_ptr<GateImpl> operator()(const RandomGateOptions& o) const {
      return std::make_shared<RandomGateImpl>(o, D, H, tensors);
    }
    std::shared_ptr<GateImpl> operator()(const BudgetGateOptions& o) const {
      return std::make_shared<BudgetGateImpl>(o, D, H, tensors);
    }
    std::shared_ptr<GateImpl> operator()(const HardConcreteGateOptions& o) const {
      return std::make_shared<HardConcreteGateImpl>(o, D, H, tensors);
    }
  };
  return std::visit(Make{embed_dim, num_heads, tensor_options}, options);
}

namespace {

// The gates of type G in `model`, itself among them. (modules() with the model itself would need it
// to be owned by a shared pointer.)
template <typename G>
std::vector<G*> find_gates(const torch::nn::Module& model) {
  std::vector<G*> found;
  if (auto* gate = dynamic_cast<G*>(const_cast<torch::nn::Module*>(&model))) {
    found.push_back(gate);
  }
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (auto* gate = dynamic_cast<G*>(module.get())) {
      found.push_back(gate);
    }
  }
  return found;
}

}  // namespace

at::Tensor penalty(const torch::nn::Module& model) {
  std::vector<std::vector<const TargetedGateImpl*>> pools;
  std::vector<at::Tensor> own, terms;
  for (const auto* gate : find_gates<TargetedGateImpl>(model)) {
    if (!gate->expected_heads.defined()) {
      continue;
    }
    if (gate->target().scope == "layer") {
      own.push_back(gate->penalty());
      continue;
    }
    const auto pool = std::find_if(pools.begin(), pools.end(), [&](const auto& members) {
      return members.front()->target() == gate->target();
    });
    (pool == pools.end() ? pools.emplace_back() : *pool).push_back(gate);
    if (gate->regulariser.defined()) {
      own.push_back(gate->regulariser);
    }
  }
  for (const auto& pool : pools) {
    std::vector<at::Tensor> expected;
    std::vector<int64_t> heads;
    for (const auto* gate : pool) {
      expected.push_back(gate->expected_heads);
      heads.push_back(gate->num_heads());
    }
    const auto* first = pool.front();
    const auto& target = first->target();
    terms.push_back(target_penalty(expected, heads, first->progress, target.target, target.initial,
                                   target.warmup, target.strength, target.form,
                                   optional(first->multipliers_or_undefined())));
  }
  if (!own.empty()) {
    terms.push_back(at::stack(own).mean());
  }
  return terms.empty() ? at::zeros({}) : at::stack(terms).sum();
}

void anneal(torch::nn::Module& model, double progress) {
  TORCH_CHECK_VALUE(progress >= 0.0 && progress <= 1.0, "progress must be between 0 and 1, got ",
                    progress);
  for (auto* gate : find_gates<GateImpl>(model)) {
    gate->anneal(progress);
  }
}

}  // namespace headwise

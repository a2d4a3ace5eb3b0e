#include "headwise/cofi_module.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "explain/numbers.h"
#include "gates/budget.h"
#include "gates/checks.h"
#include "gates/hard_concrete.h"
#include "gates/selection_ops.h"
#include "headwise/calibration.h"
#include "headwise/cofi.h"

namespace headwise {
namespace {

/// Logits are held within +-this, so that no mask is ever certain: ln(100).
constexpr double kClamp = 4.605;
enum Group { kHeads, kAttention, kNeurons, kFfn, kHidden };
constexpr std::array<const char*, 5> kNames{"heads", "attention", "neurons", "ffn", "hidden"};

/// Gives a layer the mask of its heads. Heads of mask 0 do not run, in training either: no gradient
/// would reach them.
class MaskGate : public GateImpl {
 public:
  MaskGate(int64_t embed_dim, int64_t num_heads, const at::Tensor& mask)
      : GateImpl("headwise::MaskGate", embed_dim, num_heads, "selected"), mask_(mask) {}

  Selection forward(const at::Tensor& x, const at::Tensor&) override {
    check_input(x);
    Selection selection;
    selection.weight = mask_.to(x.options()).expand({x.size(0), -1});  // [B, H]
    std::tie(selection.index, selection.count) = select_nonzero(selection.weight);
    return selection;
  }

 private:
  const at::Tensor& mask_;  // of the CoFi, which takes the gate out before it goes
};

struct Units {
  std::vector<int64_t> kept;
  std::vector<double> scale;
};

Units units_of(const at::Tensor& mask) {
  const at::Tensor values = mask.detach().to(at::kCPU, at::kDouble).contiguous();
  Units units;
  for (int64_t i = 0; i < values.numel(); ++i) {
    const double value = values.const_data_ptr<double>()[i];
    if (value == 0.0) continue;
    units.kept.push_back(i);
    units.scale.push_back(value);
  }
  return units;
}

std::string four_digits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4f", value);
  return text;
}

}  // namespace

CoFiImpl::CoFiImpl(AttentionLayers layers, std::vector<FfnSize> ffn, CoFiOptions options_)
    : torch::nn::Module("headwise::CoFi"),
      options(std::move(options_)),
      layers_(std::move(layers)),
      ffn_(std::move(ffn)) {
  TORCH_CHECK_VALUE(options.target() >= 0.0 && options.target() < 1.0,
                    "target must be in [0, 1), got ", options.target());
  check_unit("warmup", options.warmup());
  TORCH_CHECK_VALUE(std::isfinite(options.init_log_alpha()), "init_log_alpha must be finite, got ",
                    options.init_log_alpha());
  TORCH_CHECK_VALUE(!layers_.empty(), "layers must not be empty: there is nothing to prune");
  const int64_t width = layers_.front().second->options.embed_dim();
  for (const auto& [name, layer] : layers_) {
    TORCH_CHECK_VALUE(!layer->gate, "layer '", name, "' has a gate: build it without");
    TORCH_CHECK_VALUE(layer->options.embed_dim() == width,
                      "layers must agree in width, got embed_dim=", width, " and ",
                      layer->options.embed_dim(), " in layer '", name, "'");
    sizes_[kHeads].push_back(layer->options.num_heads());
    head_dims_.push_back(layer->head_dim());
  }
  for (const FfnSize& network : ffn_) sizes_[kNeurons].push_back(network.num_neurons);
  sizes_[kAttention] = {static_cast<int64_t>(layers_.size())};
  sizes_[kFfn] = {static_cast<int64_t>(ffn_.size())};
  sizes_[kHidden] = {width};
  const std::array<bool, 5> wanted{options.heads(), options.attention_blocks(),
                                   options.neurons() && !ffn_.empty(),
                                   options.ffn_blocks() && !ffn_.empty(), options.hidden()};
  TORCH_CHECK_VALUE(std::find(wanted.begin(), wanted.end(), true) != wanted.end(),
                    "at least one of the masks must be on: there is nothing to prune");
  const auto type =
      at::TensorOptions(at::kFloat).device(layers_.front().second->out_proj->weight.device());
  const auto groups = register_module("logits", std::make_shared<torch::nn::Module>("logits"));
  for (size_t group = 0; group < kNames.size(); ++group) {
    if (!wanted[group]) continue;
    const auto list =
        groups->register_module(kNames[group], std::make_shared<torch::nn::Module>(kNames[group]));
    for (size_t i = 0; i < sizes_[group].size(); ++i) {
      logits_[group].push_back(
          list->register_parameter(std::to_string(i), at::empty({sizes_[group][i]}, type)));
    }
  }
  multipliers = register_parameter("multipliers", at::zeros({2}, type));
  progress = register_buffer("progress", at::zeros({}, type));
  shift = register_buffer("shift", at::zeros({2}, type));
  for (const int group : {kNeurons, kHidden, kHeads}) {
    if (finest_ < 0 && wanted[group]) finest_ = group;
  }
  const c10::NoGradGuard no_grad;
  size_ = size_of(each([](const at::Tensor& p, int) { return at::ones_like(p); })).item<double>();
  reset_masks(options.init_log_alpha());
  check_reachable();
  values_ = constant_values();
  for (size_t i = 0; i < layers_.size(); ++i) {
    MultiheadAttentionImpl& layer = *layers_[i].second;
    layer.gate = std::make_shared<MaskGate>(width, sizes_[kHeads][i], values_[kHeads][i]);
  }
}

CoFiImpl::~CoFiImpl() {
  for (auto& [name, layer] : layers_) {
    if (dynamic_cast<MaskGate*>(layer->gate.get()) != nullptr) layer->gate = nullptr;
  }
}

template <typename Make>
CoFiImpl::Values CoFiImpl::each(Make make) const {
  Values values;
  for (size_t group = 0; group < kNames.size(); ++group) {
    for (size_t i = 0; i < sizes_[group].size(); ++i) {
      values[group].push_back(logits_[group].empty()
                                  ? at::ones({sizes_[group][i]}, progress.options())
                                  : make(logits_[group][i], static_cast<int>(group)));
    }
  }
  return values;
}

at::Tensor CoFiImpl::size_of(const Values& v) const {
  return structure_size(v[kHeads], v[kAttention][0], v[kNeurons], v[kFfn][0], v[kHidden][0],
                        head_dims_);
}

void CoFiImpl::check_reachable() const {
  const c10::NoGradGuard no_grad;
  const Values least = each([&](const at::Tensor& p, int) {
    return hard_concrete_open(at::full_like(p, -kClamp), options.beta(), options.gamma(),
                              options.zeta());
  });
  const double most = 1.0 - size_of(least).item<double>() / size_;
  TORCH_CHECK_VALUE(
      options.target() <= most, "target=", rounded(options.target(), 6),
      " cannot be reached: with every mask as closed as it gets ", four_digits(most),
      " of the weights are expected to go, so the nearest is target=", four_digits(most));
}

void CoFiImpl::reset_masks(double init_log_alpha) {
  const c10::NoGradGuard no_grad;
  options.init_log_alpha(init_log_alpha);
  for (at::Tensor parameter : mask_parameters()) {
    parameter.normal_(init_log_alpha, 0.01).clamp_(-kClamp, kClamp);
  }
  multipliers.zero_();
  shift.zero_();
}

void CoFiImpl::start(const std::map<std::string, at::Tensor>& importance, double sharpness) {
  check_not_negative("sharpness", sharpness);
  const c10::NoGradGuard no_grad;
  for (const int group : {kHeads, kNeurons}) {
    if (logits_[group].empty()) continue;
    std::vector<at::Tensor> scores;
    for (size_t i = 0; i < logits_[group].size(); ++i) {
      const std::string& name = group == kHeads ? layers_[i].first : ffn_[i].name;
      const auto found = importance.find(name);
      TORCH_CHECK_VALUE(found != importance.end(), "importance must have scores for '", name, "'");
      const at::Tensor score = found->second.to(at::kCPU, at::kDouble);
      TORCH_CHECK_VALUE(score.sizes() == logits_[group][i].sizes(), "importance of '", name,
                        "' must have ", logits_[group][i].numel(), " scores, got shape ",
                        score.sizes());
      TORCH_CHECK_VALUE(at::isfinite(score).all().item<bool>(), "importance of '", name,
                        "' must be finite, got NaN or infinity");
      scores.push_back(score);
    }
    if (at::cat(scores).numel() == 0) continue;
    const auto parts =
        importance_start(at::cat(scores), 0.5, sharpness).split_with_sizes(sizes_[group]);
    for (size_t i = 0; i < parts.size(); ++i) {
      logits_[group][i].copy_((parts[i] + options.init_log_alpha()).clamp(-kClamp, kClamp));
    }
  }
}

std::vector<at::Tensor> CoFiImpl::mask_parameters() const {
  std::vector<at::Tensor> found;
  for (const auto& group : logits_) found.insert(found.end(), group.begin(), group.end());
  return found;
}

CoFiImpl::Values CoFiImpl::constant_values() const {
  const c10::NoGradGuard no_grad;
  Values values = each([&](const at::Tensor& parameter, int group) {
    at::Tensor logits = parameter;
    // Whole blocks are decided by training; what is fine makes up for the rest.
    if (group != kAttention && group != kFfn) logits = logits + shift[0];
    if (group == finest_) logits = logits + shift[1];
    return hard_concrete_keep(logits, options.beta(), options.gamma(), options.zeta());
  });
  at::Tensor& hidden = values[kHidden][0];
  if (!hidden.any().item<bool>()) hidden[logits_[kHidden][0].argmax()] = 1.0;
  return values;
}

void CoFiImpl::draw() {
  for (at::Tensor parameter : mask_parameters()) {
    const c10::NoGradGuard no_grad;
    TORCH_CHECK_VALUE(at::isfinite(parameter).all().item<bool>(),
                      "logits of the masks must be finite, got NaN or infinity");
    if (is_training()) parameter.clamp_(-kClamp, kClamp);
  }
  Values drawn = is_training() ? each([&](const at::Tensor& logits, int) {
    return hard_concrete(logits, at::rand_like(logits), options.beta(), options.gamma(),
                         options.zeta());
  })
                               : constant_values();
  // One by one: the gates refer to the places.
  for (size_t group = 0; group < drawn.size(); ++group) {
    for (size_t i = 0; i < drawn[group].size(); ++i) values_[group][i] = drawn[group][i];
  }
}

at::Tensor CoFiImpl::heads(const std::string& name) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].first == name) return values_[kHeads][i];
  }
  TORCH_CHECK_INDEX(false, "there is no attention layer '", name, "'");
}

at::Tensor CoFiImpl::neurons(const std::string& name) const {
  for (size_t i = 0; i < ffn_.size(); ++i) {
    if (ffn_[i].name == name) return values_[kNeurons][i];
  }
  TORCH_CHECK_INDEX(false, "there is no feed-forward network '", name, "'");
}

at::Tensor CoFiImpl::block(const std::string& name) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].first == name) return values_[kAttention][0][i];
  }
  for (size_t i = 0; i < ffn_.size(); ++i) {
    if (ffn_[i].name == name) return values_[kFfn][0][i];
  }
  TORCH_CHECK_INDEX(false, "there is no attention layer or feed-forward network '", name, "'");
}

at::Tensor CoFiImpl::expected_sparsity() const {
  return 1.0 - size_of(each([&](const at::Tensor& logits, int) {
                 return hard_concrete_open(logits, options.beta(), options.gamma(), options.zeta());
               })) /
                   size_;
}

at::Tensor CoFiImpl::penalty() const {
  const at::Tensor size = size_of(each([&](const at::Tensor& logits, int) {
    return hard_concrete_open(logits, options.beta(), options.gamma(), options.zeta());
  }));
  return sparsity_penalty(size, size_, progress, options.target(), options.warmup(), multipliers);
}

void CoFiImpl::anneal(double value) {
  check_unit("progress", value);
  progress.fill_(value);
}

double CoFiImpl::sparsity_of(const Values& values) const {
  Values kept;
  for (size_t group = 0; group < values.size(); ++group) {
    for (const at::Tensor& v : values[group]) kept[group].push_back(v.ne(0).to(at::kDouble));
  }
  return 1.0 - size_of(kept).item<double>() / size_;
}

double CoFiImpl::sparsity() const { return sparsity_of(constant_values()); }

StructurePlan CoFiImpl::plan(double tolerance) {
  const c10::NoGradGuard no_grad;
  if (std::abs(sparsity() - options.target()) > tolerance) {
    shift.zero_();
    for (int64_t position = 0; position < 2; ++position) {
      const auto shifted = [&](double value) {
        shift[position] = value;
        return sparsity();
      };
      const Trial nearest =
          nearest_by_halving(shifted, options.target(), -16.0, 16.0, 50, {0.0, shifted(0.0)});
      shift[position] = nearest.argument;
    }
    const double found = sparsity();
    if (std::abs(found - options.target()) > tolerance) {
      TORCH_WARN("the plan has a sparsity of ", four_digits(found),
                 ", the nearest to target=", rounded(options.target(), 6),
                 " that the blocks allow which training kept: train on");
    }
  }
  const Values values = constant_values();
  const auto scale = [&](Group group, size_t i) { return values[group][0][i].item<double>(); };
  std::vector<LayerPlan> layers;
  std::vector<FfnPlan> networks;
  std::vector<BlockPlan> blocks;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const double block = scale(kAttention, i);
    Units units = block != 0.0 ? units_of(values[kHeads][i]) : Units{};
    layers.push_back(
        {layers_[i].first, sizes_[kHeads][i], std::move(units.kept), std::move(units.scale)});
    if (block != 1.0) blocks.push_back({layers_[i].first, block});
  }
  for (size_t i = 0; i < ffn_.size(); ++i) {
    const double block = scale(kFfn, i);
    Units units = block != 0.0 ? units_of(values[kNeurons][i]) : Units{};
    networks.push_back(
        {ffn_[i].name, ffn_[i].num_neurons, std::move(units.kept), std::move(units.scale)});
    if (block != 1.0) blocks.push_back({ffn_[i].name, block});
  }
  std::optional<HiddenPlan> hidden;
  if (!logits_[kHidden].empty()) {
    Units units = units_of(values[kHidden][0]);
    hidden = HiddenPlan{sizes_[kHidden][0], std::move(units.kept), std::move(units.scale)};
  }
  const Json metadata = {
      {"method", "cofi"}, {"target", options.target()}, {"sparsity", sparsity_of(values)}};
  return StructurePlan(HeadPlan(std::move(layers), "cofi"), std::move(networks), std::move(blocks),
                       std::move(hidden), metadata.dump());
}

}  // namespace headwise

#include "cases.h"

#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <set>

#include "headwise/analysis.h"
#include "headwise/attention.h"
#include "headwise/multihead_attention.h"
#include "report.h"

namespace bench {
namespace {

using at::Tensor;
using nlohmann::json;

constexpr const char *kOurs = "headwise", *kHeads = "k heads", *kDense = "dense";
constexpr const char *kEntropy = "attention_entropy", *kSdpa = "scaled_dot_product_attention";

/// Largest error over the largest value of the float64 reference.
double tolerance(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return 1e-10;
    case at::kFloat:
      return 1e-4;
    case at::kBFloat16:
      return 3e-2;
    default:
      return 1e-2;
  }
}

/// The error of `got`. @throws CheckFailed if it is beyond what its type allows, or not finite.
double check(const Tensor& got, const Tensor& want) {
  const auto difference = (got.to(at::kDouble) - want).abs().max() / want.abs().max();
  const double error = difference.item<double>();
  if (!(std::isfinite(error) && error <= tolerance(got.scalar_type())))
    throw CheckFailed("headwise differs from the oracle by " + std::to_string(error));
  return error;
}

/// in_weight [3E, D], in_bias [3E], out_weight [D, E], out_bias [D] of `heads` heads.
struct Weights {
  Tensor in_weight, in_bias, out_weight, out_bias;
  int64_t heads;

  std::vector<Tensor> tensors() const { return {in_weight, in_bias, out_weight, out_bias}; }
  Weights to(at::ScalarType type) const {
    const auto cast = [&](const Tensor& t) { return t.detach().to(type); };
    return {cast(in_weight), cast(in_bias), cast(out_weight), cast(out_bias), heads};
  }
  /// The layer that physically has only the first `kept` heads.
  Weights first(int64_t kept) const {
    const int64_t width = out_weight.size(1), e = kept * (width / heads);
    const auto rows = [&](const Tensor& t) {
      const auto parts = t.detach().split(width);
      return at::cat({parts[0].narrow(0, 0, e), parts[1].narrow(0, 0, e), parts[2].narrow(0, 0, e)})
          .contiguous();
    };
    return {rows(in_weight), rows(in_bias), out_weight.detach().narrow(1, 0, e).contiguous(),
            out_bias.detach().clone(), kept};
  }
};

/// The layer of all heads that `w` has; `mask` [B, H] multiplies the heads' outputs: the oracle.
Tensor dense(const Tensor& x, const Weights& w, const std::optional<Tensor>& mask = {}) {
  const auto parts = at::linear(x, w.in_weight, w.in_bias).chunk(3, 2);
  const auto heads = [&](const Tensor& t) {
    return t.view({x.size(0), x.size(1), w.heads, -1}).transpose(1, 2);  // [B, H, L, d]
  };
  auto context =
      at::scaled_dot_product_attention(heads(parts[0]), heads(parts[1]), heads(parts[2]));
  if (mask) context = context * mask->unsqueeze(-1).unsqueeze(-1);
  return at::linear(context.transpose(1, 2).flatten(2), w.out_weight, w.out_bias);
}

/// A layer of random weights and an input; its forms share both.
struct Layer {
  Shape shape;
  at::ScalarType type;
  bool training;
  Tensor x;  // [B, L, D]
  Weights weights;

  Layer(const Shape& shape, at::ScalarType type, uint64_t seed, bool training)
      : shape(shape), type(type), training(training) {
    torch::manual_seed(seed);
    const int64_t D = shape.width;
    const double scale = 1 / std::sqrt(static_cast<double>(D));
    x = random({shape.batch, shape.length, D}, 1.0);
    weights = {random({3 * D, D}, scale), random({3 * D}, 0.1), random({D, D}, scale),
               random({D}, 0.1), shape.heads};
    x.requires_grad_(training);
    for (auto t : weights.tensors()) t.requires_grad_(training);
  }
  Tensor random(at::IntArrayRef sizes, double scale) const {
    return (at::randn(sizes) * scale).to(type);
  }
  Weights kept(int64_t heads) const {
    auto w = weights.first(heads);
    for (auto t : w.tensors()) t.requires_grad_(training);
    return w;
  }
  /// headwise's layer; every sequence chooses `heads` heads of its own.
  headwise::MultiheadAttention module(int64_t heads) const {
    const double share = static_cast<double>(heads) / static_cast<double>(shape.heads);
    // A target below 1 keeps the gate at work even where every head runs.
    const auto gate = headwise::BudgetGateOptions()
                          .keep(std::min(share, 0.99))
                          .budget(share)
                          .execution("selected");
    headwise::MultiheadAttention mha(
        headwise::MultiheadAttentionOptions(shape.width, shape.heads).batch_first(true).gate(gate));
    at::NoGradGuard no_grad;
    mha->to(type);
    mha->in_proj_weight.copy_(weights.in_weight), mha->in_proj_bias.copy_(weights.in_bias);
    mha->out_proj->weight.copy_(weights.out_weight), mha->out_proj->bias.copy_(weights.out_bias);
    auto own = std::dynamic_pointer_cast<headwise::BudgetGateImpl>(mha->gate);
    own->relevance->weight.copy_(at::randn(own->relevance->weight.sizes()));
    mha->gate->anneal(1.0);
    mha->train(training);
    return mha;
  }
  /// In a network the layer before has just written the input.
  std::function<void()> touch() const {
    return [x = x] {
      at::NoGradGuard no_grad;
      x.sum();
    };
  }
};

std::function<void()> forward(std::function<Tensor()> form) {
  return [form = std::move(form)] {
    at::NoGradGuard no_grad;
    form();
  };
}

/// Forward and backward; gradients are dropped, as an optimiser's zero_grad does.
std::function<void()> step(std::function<Tensor()> form, std::vector<Tensor> leaves,
                           const Tensor& upstream) {
  return [form = std::move(form), leaves = std::move(leaves), upstream] {
    form().backward(upstream);
    for (const auto& leaf : leaves) leaf.mutable_grad() = Tensor();
  };
}

json layer_case(const Options& options, const Layer& layer, int64_t heads) {
  const auto& x = layer.x;
  const auto mha = layer.module(heads).ptr();
  const auto ours = [&x, mha] {
    return std::get<0>(mha->forward(x, x, x, {}, /*need_weights=*/false));
  };
  // Training and evaluation choose the same heads: the gate's training is at its end.
  std::optional<headwise::Selection> chosen;
  mha->on_selection = [&chosen](const headwise::Selection& selection) { chosen = selection; };
  const auto output = ours().detach();
  mha->on_selection = nullptr;
  const auto& selection = *chosen;
  const auto mask = headwise::selection_mask(selection.index, selection.count, at::kDouble) *
                    selection.weight.detach().to(at::kDouble);  // [B, H]
  double error = 0;
  {
    at::NoGradGuard no_grad;
    error = check(output, dense(x.to(at::kDouble), layer.weights.to(at::kDouble), mask));
  }
  const bool all = heads == layer.shape.heads;
  const auto own = all ? layer.weights : layer.kept(heads);
  std::vector<std::pair<std::string, std::function<Tensor()>>> forms{{kOurs, ours}};
  if (!all) forms.emplace_back(kHeads, [&x, own] { return dense(x, own); });
  forms.emplace_back(kDense, [&] { return dense(x, layer.weights); });

  Contenders contenders;
  std::vector<Tensor> leaves{x};
  for (const auto& w : {own, layer.weights})
    for (const auto& t : w.tensors()) leaves.push_back(t);
  for (const auto& t : mha->parameters()) leaves.push_back(t);
  const auto upstream = layer.random(x.sizes(), 1.0);
  for (auto& [name, form] : forms)
    contenders.emplace_back(
        name, layer.training ? step(std::move(form), leaves, upstream) : forward(std::move(form)));
  const auto times = measure(contenders, layer.touch(), options);
  const std::string yardstick = all ? kDense : kHeads;
  const auto ratio = times.ratio(kOurs, yardstick);
  json ms;
  for (const auto& [name, run] : contenders) ms[name] = to_json(times.milliseconds(name));
  json ratios{{"yardstick", to_json(ratio)}};
  if (!all) ratios[kDense] = to_json(times.ratio(kOurs, kDense));
  const auto& least = table().at("small");
  const bool small = layer.shape.batch <= least.at("batch").get<int64_t>() ||
                     layer.shape.length <= least.at("length").get<int64_t>();
  const char* goal = layer.training ? "train" : all ? "dense" : small ? "small" : "layer";
  return {{"heads", heads},         {"error", error},  {"ms", ms},
          {"yardstick", yardstick}, {"ratio", ratios}, {"goal", judge(goal, ratio.median)}};
}

}  // namespace

void layer_cases(const Options& options, const Shape& shape, at::ScalarType type, bool training,
                 const Emit& emit) {
  std::set<int64_t> counts;
  for (const double fraction : options.fractions)
    counts.insert(std::max<int64_t>(1, std::llround(fraction * static_cast<double>(shape.heads))));
  std::vector<double> heads, ms;
  for (const int64_t count : counts) {
    const Layer layer(shape, type, options.seed, training);
    auto result = layer_case(options, layer, count);
    heads.push_back(static_cast<double>(count));
    ms.push_back(result["ms"][kOurs]["median"]);
    emit(std::move(result));
  }
  if (heads.size() < 3) return;
  // What is left at no heads is the cost of gate and call.
  const auto line = fit(heads, ms);
  emit({{"what", "line"},
        {"of", training ? "train" : "layer"},
        {"heads", heads},
        {"ms", ms},
        {"slope", line.slope},
        {"intercept", line.intercept},
        {"r_squared", line.r_squared}});
}

void gate_cases(const Options& options, const Shape& shape, at::ScalarType type, const Emit& emit) {
  constexpr int64_t kLeastLength = 128;
  if (shape.length < kLeastLength) return;
  const Layer layer(shape, type, options.seed, false);
  at::NoGradGuard no_grad;
  const std::vector<std::pair<std::string, headwise::GateOptions>> kinds{
      {"BudgetGate", headwise::BudgetGateOptions()},
      {"HardConcreteGate", headwise::HardConcreteGateOptions().input_dependent(true)}};
  Contenders contenders;
  for (const auto& [name, kind] : kinds) {
    auto gate =
        headwise::make_gate(kind, shape.width, shape.heads, at::TensorOptions().dtype(type));
    gate->eval();
    // selection_mask raises if a selection is not well formed.
    const auto selection = gate->forward(layer.x);
    const auto mask = headwise::selection_mask(selection.index, selection.count, type);
    if (!at::equal(selection.weight * mask, selection.weight))
      throw CheckFailed("a gate weighs heads that it does not choose");
    contenders.emplace_back(name, [gate, x = layer.x] { gate->forward(x); });
  }
  contenders.emplace_back(kDense, [&] { dense(layer.x, layer.weights); });
  const auto times = measure(contenders, layer.touch(), options);
  for (const auto& [name, kind] : kinds) {
    const auto ratio = times.ratio(name, kDense);
    emit({{"gate", name},
          {"ms",
           {{name, to_json(times.milliseconds(name))},
            {kDense, to_json(times.milliseconds(kDense))}}},
          {"yardstick", kDense},
          {"ratio", {{"yardstick", to_json(ratio)}}},
          {"goal", judge("gate", ratio.median)}});
  }
}

void entropy_case(const Options& options, const Shape& shape, at::ScalarType type,
                  const Emit& emit) {
  torch::manual_seed(options.seed);
  at::NoGradGuard no_grad;
  const auto random = [&] {
    return at::randn({shape.batch, shape.heads, shape.length, shape.width / shape.heads}).to(type);
  };
  const auto q = random(), k = random(), v = random();  // [B, H, L, d]
  // The oracle, head by head: the whole map may not fit.
  auto want = at::empty({1, shape.heads}, at::kDouble);
  for (int64_t h = 0; h < shape.heads; ++h) {
    const auto scores = q[0][h].to(at::kDouble).matmul(k[0][h].to(at::kDouble).t()) /
                        std::sqrt(static_cast<double>(q.size(3)));  // [L, S]
    const auto p = scores.softmax(-1);
    want[0][h] = -(p * p.clamp_min(1e-300).log()).sum(-1).mean() /
                 std::max(std::log(static_cast<double>(k.size(2))), 1e-300);
  }
  const double error =
      check(headwise::attention_entropy(q.narrow(0, 0, 1), k.narrow(0, 0, 1)), want);
  const Contenders contenders{
      {kEntropy, [&] { headwise::attention_entropy(q, k); }},
      {kSdpa, [&] { at::scaled_dot_product_attention(q, k, v); }},
  };
  const auto times = measure(contenders, [] {}, options);
  const auto ratio = times.ratio(kEntropy, kSdpa);
  emit({{"error", error},
        {"ms",
         {{kEntropy, to_json(times.milliseconds(kEntropy))},
          {kSdpa, to_json(times.milliseconds(kSdpa))}}},
        {"yardstick", kSdpa},
        {"ratio", {{"yardstick", to_json(ratio)}}},
        {"goal", judge("entropy", ratio.median)}});
}

}  // namespace bench

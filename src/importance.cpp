#include "headwise/importance.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "json.h"
#include "shown.h"

namespace headwise {
namespace {

constexpr double kNormEpsilon = 1e-20;  // as the authors' code

/// Adds `values` (float64 [H]) to `sums`.
void accumulate(std::vector<double>& sums, const at::Tensor& values) {
  const at::Tensor host = values.to(at::kCPU, at::kDouble).contiguous();
  sums.resize(host.numel(), 0.0);
  for (int64_t h = 0; h < host.numel(); ++h) sums[h] += host.const_data_ptr<double>()[h];
}

void accumulate(std::vector<double>& sums, const std::vector<double>& values) {
  sums.resize(std::max(sums.size(), values.size()), 0.0);
  for (size_t h = 0; h < values.size(); ++h) sums[h] += values[h];
}

void check_finite(const std::string& layer, const at::Tensor& values, const char* what) {
  TORCH_CHECK_VALUE(at::isfinite(values).all().item<bool>(), what, " of ", layer_called(layer),
                    " must be finite, got NaN or infinity");
}

std::vector<double> scaled_to_unit(const std::vector<double>& values, double low, double high) {
  std::vector<double> scaled(values.size(), 0.0);  // all equal: no ranking
  if (high > low) {
    std::transform(values.begin(), values.end(), scaled.begin(),
                   [&](double value) { return (value - low) / (high - low); });
  }
  return scaled;
}

/// Each layer's values scaled to [0, 1] over the layer or over all of them.
std::vector<std::vector<double>> min_max(const std::vector<std::vector<double>>& values,
                                         Scope scope) {
  double low = INFINITY, high = -INFINITY;
  for (const auto& layer : values) {
    for (const double value : layer) low = std::min(low, value), high = std::max(high, value);
  }
  std::vector<std::vector<double>> scaled;
  for (const auto& layer : values) {
    if (scope == Scope::layer && !layer.empty()) {
      const auto [least, most] = std::minmax_element(layer.begin(), layer.end());
      low = *least, high = *most;
    }
    scaled.push_back(scaled_to_unit(layer, low, high));
  }
  return scaled;
}

}  // namespace

std::string HeadScores::to_json() const {
  Json json{{"format", "headwise.scores"}, {"version", 1}, {"metric", metric}};
  json["layers"] = Json::array();
  for (size_t i = 0; i < layers.size(); ++i) {
    json["layers"].push_back({{"name", layers[i]}, {"values", values[i]}});
  }
  return json.dump(2);
}

HeadScores HeadScores::from_json(const std::string& text) {
  const Json json = parse_json(text, "scores");
  check_format(json, "headwise.scores", 1, "scores");
  check_keys(json, {"format", "version", "metric", "layers"}, "scores");
  HeadScores scores;
  scores.metric = get_string(json, "metric", "scores");
  for (const Json& entry : get_array(json, "layers", "scores")) {
    check_keys(entry, {"name", "values"}, "a layer of scores");
    scores.layers.push_back(get_string(entry, "name", "a layer of scores"));
    scores.values.push_back(get_numbers(entry, "values", layer_called(scores.layers.back())));
  }
  return scores;
}

HeadScoreAccumulator::HeadScoreAccumulator() = default;
HeadScoreAccumulator::~HeadScoreAccumulator() = default;
HeadScoreAccumulator::HeadScoreAccumulator(HeadScoreAccumulator&&) noexcept = default;
HeadScoreAccumulator& HeadScoreAccumulator::operator=(HeadScoreAccumulator&&) noexcept = default;

HeadScoreAccumulator::Layer& HeadScoreAccumulator::layer(const std::string& name, int64_t heads) {
  const auto [found, is_new] = layers_.try_emplace(name);
  if (is_new) {
    order_.push_back(name);
    found->second.heads = heads;
  }
  TORCH_CHECK_VALUE(found->second.heads == heads, layer_called(name), " had ", found->second.heads,
                    " heads before, got ", heads);
  return found->second;
}

void HeadScoreAccumulator::add_gradient(const std::string& name, const at::Tensor& context,
                                        const at::Tensor& gradient,
                                        const std::optional<at::Tensor>& query_padding_mask) {
  TORCH_CHECK_VALUE(context.dim() == 4, "context must be [B, H, L, d], got ", context.sizes());
  TORCH_CHECK_VALUE(gradient.sizes() == context.sizes(),
                    "gradient must have the shape of context, ", context.sizes(), ", got ",
                    gradient.sizes());
  at::NoGradGuard no_grad;
  const int64_t batch = context.size(0), length = context.size(2);
  at::Tensor s = (context.to(at::kDouble) * gradient.to(at::kDouble)).sum(-1);  // [B, H, L]
  double tokens = static_cast<double>(batch) * length;
  if (query_padding_mask) {
    TORCH_CHECK_VALUE(query_padding_mask->scalar_type() == at::kBool &&
                          query_padding_mask->sizes() == at::IntArrayRef({batch, length}),
                      "query_padding_mask must be bool [B, L] = [", batch, ", ", length, "], got ",
                      query_padding_mask->scalar_type(), " ", query_padding_mask->sizes());
    s = s.masked_fill(query_padding_mask->unsqueeze(1), 0.0);
    tokens -= query_padding_mask->sum().item<double>();
  }
  check_finite(name, s, "<context, gradient>");
  Layer& sums = layer(name, context.size(1));
  const at::Tensor per_example = s.sum(-1);  // [B, H]
  accumulate(sums.per_token, s.abs().sum(at::IntArrayRef({0, 2})));
  accumulate(sums.per_example, per_example.abs().sum(0));
  accumulate(sums.per_batch, per_example.sum(0).abs());
  sums.tokens += tokens;
  sums.examples += static_cast<double>(batch);
}

void HeadScoreAccumulator::add_statistics(const std::string& name, const at::Tensor& entropy,
                                          const at::Tensor& confidence) {
  TORCH_CHECK_VALUE(entropy.dim() == 2, "entropy must be [B, H], got ", entropy.sizes());
  TORCH_CHECK_VALUE(confidence.sizes() == entropy.sizes(),
                    "confidence must have the shape of entropy, ", entropy.sizes(), ", got ",
                    confidence.sizes());
  check_finite(name, entropy, "entropy");
  check_finite(name, confidence, "confidence");
  Layer& sums = layer(name, entropy.size(1));
  accumulate(sums.entropy, entropy.detach().to(at::kDouble).sum(0));
  accumulate(sums.confidence, confidence.detach().to(at::kDouble).sum(0));
  sums.statistics += static_cast<double>(entropy.size(0));
}

void HeadScoreAccumulator::merge(const HeadScoreAccumulator& other) {
  for (const std::string& name : other.order_) {
    const Layer& theirs = other.layers_.at(name);
    Layer& ours = layer(name, theirs.heads);
    accumulate(ours.per_token, theirs.per_token);
    accumulate(ours.per_example, theirs.per_example);
    accumulate(ours.per_batch, theirs.per_batch);
    accumulate(ours.entropy, theirs.entropy);
    accumulate(ours.confidence, theirs.confidence);
    ours.tokens += theirs.tokens;
    ours.examples += theirs.examples;
    ours.statistics += theirs.statistics;
  }
}

/// `value(layer)` gives {sums, divisor} of a layer.
template <typename Value>
HeadScores HeadScoreAccumulator::collect(const std::string& metric, Value value) const {
  HeadScores scores{metric, order_, {}};
  for (const std::string& name : order_) {
    const auto [sums, divisor] = value(layers_.at(name));
    TORCH_CHECK_VALUE(divisor > 0, metric, " of ", layer_called(name),
                      " has seen no data: no batch was added, or all of it is padding");
    auto& values = scores.values.emplace_back(sums);
    values.resize(layers_.at(name).heads, 0.0);
    for (double& v : values) v /= divisor;
  }
  TORCH_CHECK_VALUE(!order_.empty(), metric, " has seen no data: no batch was added");
  return scores;
}

HeadScores HeadScoreAccumulator::michel(AbsoluteValue absolute, bool normalize) const {
  HeadScores scores = collect("michel", [&](const Layer& layer) {
    switch (absolute) {
      case AbsoluteValue::per_token:
        return std::pair(layer.per_token, layer.tokens);
      case AbsoluteValue::per_example:
        return std::pair(layer.per_example, layer.examples);
      default:
        return std::pair(layer.per_batch, layer.examples);
    }
  });
  double largest = 0;
  for (const auto& layer : scores.values) {
    for (const double value : layer) largest = std::max(largest, value);
  }
  TORCH_CHECK_VALUE(largest > 0,
                    "michel is zero for every head: the loss does not depend on the heads");
  if (normalize) {
    for (auto& layer : scores.values) {
      double squares = 0;
      for (const double value : layer) squares += value * value;
      for (double& value : layer) value /= std::sqrt(squares) + kNormEpsilon;
    }
  }
  return scores;
}

HeadScores HeadScoreAccumulator::entropy() const {
  return collect("entropy", [](const Layer& l) { return std::pair(l.entropy, l.statistics); });
}

HeadScores HeadScoreAccumulator::attention_confidence() const {
  return collect("attention_confidence",
                 [](const Layer& l) { return std::pair(l.confidence, l.statistics); });
}

HeadScores hies(const HeadScores& importance, const HeadScores& entropy, double alpha,
                Scope scope) {
  TORCH_CHECK_VALUE(alpha >= 0.0 && alpha <= 1.0, "alpha must be in [0, 1], got ", alpha);
  TORCH_CHECK_VALUE(importance.layers == entropy.layers,
                    "importance and entropy must have the same layers");
  const auto importance_n = min_max(importance.values, scope);
  const auto entropy_n = min_max(entropy.values, scope);
  HeadScores scores{"hies", importance.layers, {}};
  for (size_t i = 0; i < importance_n.size(); ++i) {
    TORCH_CHECK_VALUE(importance_n[i].size() == entropy_n[i].size(),
                      layer_called(importance.layers[i]), " has ", importance_n[i].size(),
                      " heads in importance and ", entropy_n[i].size(), " in entropy");
    auto& values = scores.values.emplace_back();
    for (size_t h = 0; h < importance_n[i].size(); ++h) {
      values.push_back(alpha * importance_n[i][h] + (1 - alpha) * (1 - entropy_n[i][h]));
    }
  }
  return scores;
}

}  // namespace headwise

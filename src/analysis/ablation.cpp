#include "headwise/ablation.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "analysis/intervention.h"
#include "headwise/statistics.h"

namespace headwise {
namespace {

using Values = std::vector<std::vector<double>>;

/// float64 [heads] by layer.
Values by_layer(const at::Tensor& values, const Values& like) {
  const at::Tensor host = values.to(at::kCPU, at::kDouble).contiguous();
  const double* next = host.const_data_ptr<double>();
  Values found;
  for (const auto& layer : like) {
    found.emplace_back(next, next + layer.size());
    next += layer.size();
  }
  return found;
}

/// @param kept what a layer's factors are but for the head in question
Ablation ablate(const char* metric, double kept, double sign, const AttentionLayers& layers,
                int64_t batches, const BatchLoss& loss, const AblationOptions& options) {
  const at::NoGradGuard no_grad;
  analysis::ScaledHeads scaled(layers);
  const at::Tensor full = analysis::example_losses(batches, loss);  // [N]
  HeadScores scores{metric, {}, {}};
  std::vector<at::Tensor> losses;
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t heads = layers[i].second->options.num_heads();
    scores.layers.push_back(layers[i].first);
    scores.values.emplace_back(heads);
    const at::Tensor whole = scaled.factors[i];
    for (int64_t head = 0; head < heads; ++head) {
      scaled.factors[i] = at::full_like(whole, kept);
      scaled.factors[i][head] = 1.0 - kept;
      losses.push_back(analysis::example_losses(batches, loss));
      TORCH_CHECK_VALUE(losses.back().sizes() == full.sizes(), "loss must return as many losses ",
                        "every time, got ", losses.back().numel(), " after ", full.numel());
    }
    scaled.factors[i] = whole;
  }
  TORCH_CHECK_VALUE(!losses.empty(), "layers must have heads, got none");
  const at::Tensor difference = (at::stack(losses) - full) * sign;  // [heads, N]
  TORCH_CHECK_VALUE(difference.ne(0).any().item<bool>(), metric,
                    " is zero for every head: the loss does not depend on the heads, or is too "
                    "coarse to show it");
  const auto [mean, low, high, p] =
      paired_bootstrap(difference, options.resamples(), options.seed(), options.confidence());
  const Values like = scores.values;
  scores.values = by_layer(mean, like);
  return {std::move(scores), by_layer(low, like), by_layer(high, like), by_layer(p, like), full};
}

}  // namespace

std::vector<std::pair<std::string, int64_t>> Ablation::significant(double level) const {
  std::vector<std::pair<std::string, int64_t>> found;
  for (size_t i = 0; i < p_value.size(); ++i) {
    for (size_t head = 0; head < p_value[i].size(); ++head) {
      if (p_value[i][head] < level) found.emplace_back(scores.layers[i], head);
    }
  }
  return found;
}

Ablation ablate_heads(const AttentionLayers& layers, int64_t batches, const BatchLoss& loss,
                      const AblationOptions& options) {
  return ablate("ablation", 1.0, 1.0, layers, batches, loss, options);
}

Ablation keep_one_head(const AttentionLayers& layers, int64_t batches, const BatchLoss& loss,
                       const AblationOptions& options) {
  return ablate("all-but-one", 0.0, -1.0, layers, batches, loss, options);
}

}  // namespace headwise

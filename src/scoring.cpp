#include "headwise/scoring.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "headwise/instrument.h"
#include "probe_statistics.h"
#include "scoring.h"
#include "shown.h"

namespace headwise {
namespace {

bool has(const std::vector<std::string>& metrics, std::initializer_list<const char*> wanted) {
  return std::any_of(wanted.begin(), wanted.end(), [&](const char* name) {
    return std::find(metrics.begin(), metrics.end(), name) != metrics.end();
  });
}

}  // namespace

HeadScorer::HeadScorer(std::vector<std::string> metrics, ScoreOptions options)
    : metrics_(std::move(metrics)), options_(options) {
  TORCH_CHECK_VALUE(!metrics_.empty(), "metrics must name at least one metric, got none");
  for (const std::string& metric : metrics_) {
    TORCH_CHECK_VALUE(has({metric}, {"michel", "entropy", "attention_confidence", "hies"}),
                      "metrics must be of michel, entropy, attention_confidence, hies, got ",
                      shown(metric, 100, '\''));
  }
  TORCH_CHECK_VALUE(options_.alpha() >= 0 && options_.alpha() <= 1, "alpha must be in [0, 1], got ",
                    options_.alpha());
  gradients_ = has(metrics_, {"michel", "hies"});
  statistics_ = has(metrics_, {"entropy", "attention_confidence", "hies"});
}

void HeadScorer::see(const std::string& layer, const AttentionProbe& probe) {
  std::optional<at::Tensor> padding;  // bool [B, L]
  if (probe.query_padding_mask) padding = is_padding(*probe.query_padding_mask);
  if (gradients_) {
    at::Tensor context = probe.context;
    if (!context.requires_grad()) context.requires_grad_();  // a frozen model: it starts here
    calls_.push_back({layer, context, padding});
  }
  if (statistics_) {
    const at::NoGradGuard no_grad;
    const auto [entropy, confidence] = probe_statistics(probe);
    sums_.add_statistics(layer, entropy, confidence);
  }
}

void HeadScorer::add(const at::Tensor& loss) {
  const std::vector<Call> calls = std::exchange(calls_, {});
  ++batches_;
  if (!gradients_) return;
  TORCH_CHECK_VALUE(loss.defined() && loss.dim() <= 1 && loss.is_floating_point(),
                    "loss_fn must return a floating tensor, one loss per example [B] or their ",
                    "mean, got ", loss.defined() ? c10::str("shape ", loss.sizes()) : "no tensor");
  TORCH_CHECK_VALUE(!calls.empty(),
                    "loss_fn must run the model: none of its attention layers was called");
  TORCH_CHECK_VALUE(at::isfinite(loss).all().item<bool>(),
                    "loss_fn must return a finite loss, got NaN or infinity");
  TORCH_CHECK_VALUE(loss.requires_grad(),
                    "loss_fn must return a loss that depends on the model's output");
  std::vector<at::Tensor> contexts;
  for (const Call& call : calls) contexts.push_back(call.context);
  const at::Tensor total =
      loss.dim() == 1 ? loss.sum() : loss * static_cast<double>(contexts[0].size(0));
  const auto gradients =
      torch::autograd::grad({total}, contexts, /*grad_outputs=*/{}, /*retain_graph=*/{},
                            /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < calls.size(); ++i) {
    const at::Tensor context = calls[i].context.detach();
    sums_.add_gradient(calls[i].layer, context,
                       gradients[i].defined() ? gradients[i] : at::zeros_like(context),
                       calls[i].padding);
  }
}

std::map<std::string, HeadScores> HeadScorer::scores() const {
  TORCH_CHECK_VALUE(batches_ > 0, "batches must not be empty: there is nothing to score heads on");
  std::map<std::string, HeadScores> found;
  for (const std::string& metric : metrics_) {
    if (metric == "michel") found[metric] = sums_.michel(options_.absolute(), options_.normalize());
    if (metric == "entropy") found[metric] = sums_.entropy();
    if (metric == "attention_confidence") found[metric] = sums_.attention_confidence();
    if (metric == "hies") {
      const HeadScores importance = sums_.michel(AbsoluteValue::per_example, options_.normalize());
      found[metric] = hies(importance, sums_.entropy(), options_.alpha(), options_.scope());
    }
  }
  return found;
}

std::map<std::string, HeadScores> score_heads(const AttentionLayers& layers, int64_t batches,
                                              const BatchLoss& loss_fn,
                                              const std::vector<std::string>& metrics,
                                              const ScoreOptions& options) {
  HeadScorer scorer(metrics, options);
  Instrumented opened(layers);
  opened.probe_with([&](size_t i, const AttentionProbe& p) { scorer.see(layers[i].first, p); },
                    scorer.needs_gradients());
  const at::AutoGradMode mode(scorer.needs_gradients());
  for (int64_t batch = 0; batch < batches; ++batch) scorer.add(loss_fn(batch));
  return scorer.scores();
}

std::vector<int64_t> pruning_counts(int64_t total, double keep, double step) {
  TORCH_CHECK_VALUE(keep > 0.0 && keep <= 1.0, "keep must be in (0, 1], got ", keep);
  TORCH_CHECK_VALUE(step > 0.0 && step <= 1.0, "step must be in (0, 1], got ", step);
  const auto share = [&](double fraction) {
    const auto units = static_cast<double>(total);
    return std::max<int64_t>(1, static_cast<int64_t>(std::floor(fraction * units + 0.5)));
  };
  const int64_t last = share(keep), removed = share(step);
  std::vector<int64_t> counts;
  for (int64_t count = total - removed; count > last; count -= removed) counts.push_back(count);
  counts.push_back(last);
  return counts;
}

HeadPlan narrowed(const HeadPlan& before, const HeadScores& scores, int64_t count,
                  int64_t min_heads_per_layer) {
  TORCH_CHECK_VALUE(scores.layers.size() == before.layers().size(),
                    "scores must be of the layers of the plan before, ", before.layers().size(),
                    ", got ", scores.layers.size());
  for (size_t i = 0; i < scores.layers.size(); ++i) {
    const LayerPlan& layer = before.layers()[i];
    TORCH_CHECK_VALUE(
        scores.layers[i] == layer.name && scores.values[i].size() == layer.heads.size(),
        "scores must be of the ", layer.heads.size(), " heads left in ", layer_called(layer.name),
        ", got ", scores.values[i].size(), " of '", scores.layers[i], "'");
  }
  const double ranked = static_cast<double>(before.heads_kept());
  TORCH_CHECK_VALUE(count >= 1 && count <= before.heads_kept(), "count must be in 1..",
                    before.heads_kept(), ", got ", count);
  const HeadPlan chosen = plan(scores, static_cast<double>(count) / ranked, min_heads_per_layer);
  std::vector<LayerPlan> layers;
  for (size_t i = 0; i < chosen.layers().size(); ++i) {
    const LayerPlan& from = before.layers()[i];
    LayerPlan layer{from.name, from.num_heads, {}, {}};
    for (const int64_t place : chosen.layers()[i].heads) {
      layer.heads.push_back(from.heads[place]);
      layer.scale.push_back(from.scale[place]);
    }
    layers.push_back(std::move(layer));
  }
  return HeadPlan(std::move(layers), scores.metric);
}

}  // namespace headwise

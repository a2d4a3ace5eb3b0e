#include "headwise/scoring.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "analysis/intervention.h"
#include "analysis/probe_statistics.h"
#include "json.h"

namespace headwise {
namespace {

bool has(const std::vector<std::string>& metrics, std::initializer_list<const char*> wanted) {
  return std::any_of(wanted.begin(), wanted.end(), [&](const char* name) {
    return std::find(metrics.begin(), metrics.end(), name) != metrics.end();
  });
}

void check_metrics(const std::vector<std::string>& metrics) {
  TORCH_CHECK_VALUE(!metrics.empty(), "metrics must name at least one metric, got none");
  for (const std::string& metric : metrics) {
    TORCH_CHECK_VALUE(has({metric}, {"michel", "entropy", "confidence", "hies"}),
                      "metrics must be of michel, entropy, confidence, hies, got '", metric, "'");
  }
}

void check_loss(const at::Tensor& loss) {
  TORCH_CHECK_VALUE(loss.defined() && loss.dim() <= 1 && loss.is_floating_point(),
                    "loss must return a floating tensor, one loss an example [B] or their mean, ",
                    "got ", loss.defined() ? c10::str("shape ", loss.sizes()) : "no tensor");
  TORCH_CHECK_VALUE(at::isfinite(loss).all().item<bool>(),
                    "loss must return a finite loss, got NaN or infinity");
  TORCH_CHECK_VALUE(loss.requires_grad(),
                    "loss must return a loss that depends on the model's output");
}

void refuse_gates(const AttentionLayers& layers) {
  for (const auto& [name, layer] : layers) {
    TORCH_CHECK_VALUE(!layer->gate, "layers must have no gates, got one in layer '", name,
                      "': compact it first (headwise::prune)");
  }
}

/// Hands what each layer computed in a batch to an accumulator.
class Recorder {
 public:
  Recorder(const AttentionLayers& layers, bool gradients, bool statistics)
      : layers_(layers), gradients_(gradients), statistics_(statistics) {
    for (const auto& [name, layer] : layers_) {
      before_.emplace_back(layer->probe, layer->probe_context);
      layer.ptr()->probe = [this, name = name](const AttentionProbe& probe) { see(name, probe); };
      layer.ptr()->probe_context = gradients_;
    }
  }
  ~Recorder() {
    for (size_t i = 0; i < layers_.size(); ++i) {
      MultiheadAttentionImpl& layer = *layers_[i].second.ptr();
      std::tie(layer.probe, layer.probe_context) = before_[i];
    }
  }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  void run(const BatchLoss& loss_of, int64_t batch) {
    calls_.clear();
    at::Tensor loss;
    {
      const at::AutoGradMode mode(gradients_);
      loss = loss_of(batch);
    }
    if (!gradients_) return;
    TORCH_CHECK_VALUE(!calls_.empty(), "loss must run the model: none of its layers was called");
    check_loss(loss);
    std::vector<at::Tensor> contexts;
    for (const Call& call : calls_) contexts.push_back(call.context);
    const at::Tensor total =
        loss.dim() == 1 ? loss.sum() : loss * static_cast<double>(contexts[0].size(0));
    const auto gradients =
        torch::autograd::grad({total}, contexts, /*grad_outputs=*/{}, /*retain_graph=*/{},
                              /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < calls_.size(); ++i) {
      accumulator.add_gradient(
          calls_[i].layer, calls_[i].context.detach(),
          gradients[i].defined() ? gradients[i] : at::zeros_like(calls_[i].context),
          calls_[i].padding);
    }
    calls_.clear();
  }

  HeadScoreAccumulator accumulator;

 private:
  struct Call {
    std::string layer;
    at::Tensor context;                 // [B, H, L, d]
    std::optional<at::Tensor> padding;  // bool [B, L]
  };

  void see(const std::string& name, const AttentionProbe& probe) {
    if (gradients_) {
      at::Tensor context = probe.context;
      if (!context.requires_grad()) context.requires_grad_();  // a frozen model: it starts here
      std::optional<at::Tensor> padding;
      if (probe.query_padding_mask) padding = is_padding(*probe.query_padding_mask);
      calls_.push_back({name, context, padding});
    }
    if (statistics_) {
      const at::NoGradGuard no_grad;
      const auto [entropy, confidence] = probe_statistics(probe);
      accumulator.add_statistics(name, entropy, confidence);
    }
  }

  const AttentionLayers& layers_;
  bool gradients_, statistics_;
  std::vector<std::pair<std::function<void(const AttentionProbe&)>, bool>> before_;
  std::vector<Call> calls_;  // of the batch under way
};

/// What one pass gathers for `metrics`.
HeadScoreAccumulator gathered(const AttentionLayers& layers, int64_t batches, const BatchLoss& loss,
                              const std::vector<std::string>& metrics) {
  TORCH_CHECK_VALUE(batches > 0, "batches must not be empty: there is nothing to score heads on");
  Recorder recorder(layers, has(metrics, {"michel", "hies"}),
                    has(metrics, {"entropy", "confidence", "hies"}));
  for (int64_t batch = 0; batch < batches; ++batch) recorder.run(loss, batch);
  return std::move(recorder.accumulator);
}

/// The scores of the heads that `kept` has, in its order. A head that does not run has michel 0, so
/// leaving it out does not change the norm of its layer.
HeadScores of_kept(const HeadScores& scores, const HeadPlan& kept) {
  HeadScores found{scores.metric, {}, {}};
  for (const LayerPlan& layer : kept.layers()) {
    const auto place = std::find(scores.layers.begin(), scores.layers.end(), layer.name);
    TORCH_CHECK_VALUE(place != scores.layers.end(), "loss must run every layer, got none of '",
                      layer.name, "'");
    const auto& values = scores.values[place - scores.layers.begin()];
    found.layers.push_back(layer.name);
    auto& own = found.values.emplace_back();
    for (const int64_t head : layer.heads) own.push_back(values.at(head));
  }
  return found;
}

HeadScores scores_of(const HeadScoreAccumulator& sums, const std::string& metric,
                     const ScoreOptions& options, const HeadPlan* kept = nullptr) {
  const auto among = [&](HeadScores scores) { return kept ? of_kept(scores, *kept) : scores; };
  if (metric == "michel") return among(sums.michel(options.absolute(), options.normalize()));
  if (metric == "entropy") return among(sums.entropy());
  if (metric == "confidence") return among(sums.confidence());
  return hies(among(sums.michel(AbsoluteValue::per_example, options.normalize())),
              among(sums.entropy()), options.alpha(), options.scope());
}

LayerPlan all_of(const std::string& name, int64_t heads) {
  LayerPlan layer{name, heads, {}, std::vector(heads, 1.0)};
  for (int64_t head = 0; head < heads; ++head) layer.heads.push_back(head);
  return layer;
}

/// Runs the heads of `plan` and no others.
void put(analysis::ScaledHeads& scaled, const AttentionLayers& layers, const HeadPlan& plan) {
  for (const LayerPlan& layer : plan.layers()) {
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layer.name != layers[i].first) continue;
      at::Tensor mask = at::zeros_like(scaled.factors[i]);  // [H]
      for (const int64_t head : layer.heads) mask[head] = 1.0;
      scaled.factors[i] = mask;
    }
  }
}

}  // namespace

std::map<std::string, HeadScores> score_heads(const AttentionLayers& layers, int64_t batches,
                                              const BatchLoss& loss,
                                              const std::vector<std::string>& metrics,
                                              const ScoreOptions& options) {
  check_metrics(metrics);
  const HeadScoreAccumulator sums = gathered(layers, batches, loss, metrics);
  std::map<std::string, HeadScores> found;
  for (const std::string& metric : metrics) found[metric] = scores_of(sums, metric, options);
  return found;
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
        "scores must be of the ", layer.heads.size(), " heads left in layer '", layer.name,
        "', got ", scores.values[i].size(), " of '", scores.layers[i], "'");
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

std::vector<HeadPlan> pruning_path(const AttentionLayers& layers, int64_t batches,
                                   const BatchLoss& loss, double keep,
                                   const PruningPathOptions& options) {
  check_metrics({options.metric()});
  refuse_gates(layers);
  analysis::ScaledHeads scaled(layers);
  const auto score = [&](const HeadPlan* kept) {
    const auto sums = gathered(layers, batches, loss, {options.metric()});
    return scores_of(sums, options.metric(), options.scoring(), kept);
  };
  const HeadScores first = score(nullptr);
  std::vector<LayerPlan> whole;
  for (size_t i = 0; i < first.layers.size(); ++i) {
    whole.push_back(all_of(first.layers[i], static_cast<int64_t>(first.values[i].size())));
  }
  const HeadPlan all(std::move(whole), options.metric());
  const auto counts = pruning_counts(all.num_heads(), keep, options.step());
  narrowed(all, first, counts.back(), options.min_heads_per_layer());  // can it be reached?
  std::vector<HeadPlan> plans;
  for (const int64_t count : counts) {
    const bool anew = options.exact() && !plans.empty();
    if (anew) put(scaled, layers, plans.back());
    const HeadPlan chosen =
        anew ? narrowed(plans.back(), score(&plans.back()), count, options.min_heads_per_layer())
             : narrowed(all, first, count, options.min_heads_per_layer());
    const Json metadata = {
        {"keep", static_cast<double>(count) / static_cast<double>(all.num_heads())},
        {"step", options.step()},
        {"exact", options.exact()},
        {"min_heads_per_layer", options.min_heads_per_layer()}};
    plans.emplace_back(chosen.layers(), options.metric(), metadata.dump());
  }
  return plans;
}

FisherAccumulator fisher_gradients(const AttentionLayers& layers, int64_t batches,
                                   const BatchLoss& loss) {
  TORCH_CHECK_VALUE(batches > 0, "batches must not be empty: there is nothing to calibrate on");
  const at::AutoGradMode mode(true);
  analysis::ScaledHeads scaled(layers);
  std::vector<at::Tensor> leaves;
  for (at::Tensor& factor : scaled.factors) leaves.push_back(factor.requires_grad_());
  FisherAccumulator fisher;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const at::Tensor losses = loss(batch);
    check_loss(losses);
    const auto gradients = torch::autograd::grad({losses.mean()}, leaves, {}, {}, false, true);
    for (size_t i = 0; i < layers.size(); ++i) {
      fisher.add(layers[i].first,
                 gradients[i].defined() ? gradients[i] : at::zeros_like(leaves[i]));
    }
  }
  return fisher;
}

HeadPlan kwon_plan(const AttentionLayers& layers, int64_t batches, const BatchLoss& loss,
                   double macs, bool rearrange_heads) {
  TORCH_CHECK_VALUE(macs > 0.0 && macs <= 1.0, "macs must be in (0, 1], got ", macs);
  refuse_gates(layers);
  TORCH_CHECK_VALUE(!layers.empty(), "layers must have heads, got none");
  const auto width = [](const auto& item) {
    return std::pair(item.second->options.embed_dim(), item.second->head_dim());
  };
  for (const auto& item : layers) {
    TORCH_CHECK_VALUE(width(item) == width(layers.front()),
                      "layers must agree in width and head width, since all heads are counted "
                      "alike, got others in layer '",
                      item.first, "'");
  }
  const FisherAccumulator fisher = fisher_gradients(layers, batches, loss);
  UnitScores scores;
  int64_t total = 0;
  for (const auto& [name, layer] : layers) {
    scores.push_back(fisher.scores(name));
    total += layer->options.num_heads();
  }
  // A head costs 1; the product may come out a little below a whole number.
  const double limit = macs * static_cast<double>(total);
  const KeptUnits kept = search_macs(scores, {}, 1.0, 1.0, limit + 1e-9);
  std::vector<LayerPlan> plans;
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<int64_t> heads = kept.heads[i];
    if (rearrange_heads) heads = rearrange(fisher.gradients(layers[i].first), heads);
    std::vector<double> scale(heads.size(), 1.0);
    plans.push_back({layers[i].first, layers[i].second->options.num_heads(), std::move(heads),
                     std::move(scale)});
  }
  const Json metadata = {{"method", "kwon"}, {"macs", macs}, {"rearrange", rearrange_heads}};
  return HeadPlan(std::move(plans), "kwon", metadata.dump());
}

}  // namespace headwise

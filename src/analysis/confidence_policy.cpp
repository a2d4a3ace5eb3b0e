#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <sstream>

#include "analysis/intervention.h"
#include "headwise/analysis.h"
#include "headwise/confidence.h"

namespace headwise {
namespace {

std::string two_digits(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  return text;
}

/// Scores of a layer in `ranking` [H]; undefined where it has none.
at::Tensor known(const std::optional<HeadScores>& ranking, const std::string& layer) {
  if (!ranking) return {};
  const auto place = std::find(ranking->layers.begin(), ranking->layers.end(), layer);
  if (place == ranking->layers.end()) return {};
  return at::tensor(ranking->values[place - ranking->layers.begin()], at::kDouble);
}

void check_logits(const at::Tensor& logits, int64_t rows) {
  TORCH_CHECK_VALUE(
      logits.defined() && logits.dim() == 2 && logits.size(1) >= 2 && logits.size(0) == rows,
      "forward must return logits [", rows, ", C] of at least 2 classes, got ",
      logits.defined() ? c10::str("shape ", logits.sizes()) : "no tensor");
  TORCH_CHECK_VALUE(at::isfinite(logits).all().item<bool>(),
                    "forward must return finite logits, got NaN or infinity");
}

void check_batches(const std::vector<PolicyBatch>& batches) {
  TORCH_CHECK_VALUE(!batches.empty(),
                    "batches must not be empty: there is nothing to fit a threshold on");
}

}  // namespace

at::Tensor StagedPrediction::total_heads() const { return heads.sum(0); }

std::string StagedPrediction::reason(int64_t row) const {
  const auto last = stage[row].item<int64_t>();
  std::ostringstream text;
  for (int64_t s = 0; s <= last; ++s) {
    const auto sure = confidence[s][row].item<double>();
    text << (s ? "; " : "") << heads[s][row].item<int64_t>() << " heads: confidence "
         << two_digits(sure);
    if (s < last) {
      text << " < " << two_digits(threshold) << ", widened";
    } else if (sure >= threshold) {
      text << " >= " << two_digits(threshold) << ", stopped";
    } else {
      text << ", the widest budget";
    }
  }
  return text.str();
}

ConfidencePolicy::ConfidencePolicy(AttentionLayers layers, ConfidencePolicyOptions options)
    : layers_(std::move(layers)), options_(std::move(options)) {
  const auto& factors = options_.factors();
  TORCH_CHECK_VALUE(!factors.empty() && factors.front() > 0.0 && std::isfinite(factors.back()) &&
                        std::adjacent_find(factors.begin(), factors.end(),
                                           std::greater_equal<>()) == factors.end(),
                    "factors must be positive and ascending, got ", at::ArrayRef<double>(factors));
  const std::string& measure = options_.measure();
  TORCH_CHECK_VALUE(measure == "probability" || measure == "margin" || measure == "entropy",
                    "measure must be one of probability, margin, entropy, got '", measure, "'");
  TORCH_CHECK_VALUE(!std::isnan(options_.threshold()), "threshold must be a number, got NaN");
  TORCH_CHECK_VALUE(
      std::any_of(layers_.begin(), layers_.end(),
                  [](const auto& item) { return item.second->options.num_heads() > 0; }),
      "layers must have attention heads, got none");
  for (const auto& [name, layer] : layers_) {
    const at::Tensor scores = known(options_.ranking(), name);
    const int64_t heads = layer->options.num_heads();
    TORCH_CHECK_VALUE(!scores.defined() || scores.numel() == heads, "ranking must have ", heads,
                      " heads for layer '", name, "', got ", scores.numel());
    const bool silent =
        !layer->gate || dynamic_cast<const FixedGateImpl*>(layer->gate.get()) != nullptr;
    TORCH_CHECK_VALUE(scores.defined() || !silent, "layer '", name,
                      "' has no relevance of its own: ranking must have scores for it");
  }
}

at::Tensor ConfidencePolicy::run_stage(const PolicyBatch& batch, const at::Tensor& rows,
                                       double factor, at::Tensor& heads) const {
  at::Tensor total;  // int64 [N]
  std::vector<analysis::Change> changes;
  for (const auto& [name, layer] : layers_) {
    const at::Tensor scores = known(options_.ranking(), name);
    changes.push_back([&total, &name = name, scores, factor](const Selection& selection) {
      Selection wider = selection;
      if (factor != 1.0) {
        at::Tensor relevance = selection.relevance;  // [B, H]
        if (!relevance.defined()) {
          TORCH_CHECK_VALUE(scores.defined(), "layer '", name,
                            "' has no relevance: ranking must have scores for it");
          relevance = scores.to(selection.weight.options()).expand_as(selection.weight);
        }
        wider = widen_selection(selection, relevance, factor);
      }
      const at::Tensor count = wider.count.to(at::kLong);
      total = total.defined() ? total + count : count;
      return wider;
    });
  }
  const analysis::Intervention intervention(layers_, std::move(changes));
  const at::Tensor logits = batch.forward(rows);
  check_logits(logits, rows.numel());
  TORCH_CHECK_VALUE(total.defined(), "forward must call the layers: none was called");
  heads = total;
  return logits;
}

StagedPrediction ConfidencePolicy::run(const PolicyBatch& batch, bool stop,
                                       std::vector<at::Tensor>* stages) const {
  const at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(batch.size > 0 && batch.forward,
                    "batch must have a forward and at least one input, got ", batch.size);
  const auto count = static_cast<int64_t>(options_.factors().size());
  StagedPrediction found;
  found.threshold = options_.threshold();
  at::Tensor rows = at::arange(batch.size);
  for (int64_t s = 0; s < count; ++s) {
    at::Tensor heads;
    const at::Tensor logits = run_stage(batch, rows, options_.factors()[s], heads);
    if (stages) stages->push_back(logits);
    if (s == 0) {
      found.logits = at::empty_like(logits);
      found.stage = at::zeros_like(rows);
      found.confidence = at::full({count, batch.size}, std::numeric_limits<float>::quiet_NaN());
      found.heads = at::zeros({count, batch.size}, at::kLong);
    }
    const at::Tensor sure =
        prediction_confidence(logits.to(at::kFloat), options_.measure()).cpu();  // [N]
    found.logits.index_copy_(0, rows.to(logits.device()), logits);
    found.stage.index_fill_(0, rows, s);
    found.confidence[s].index_copy_(0, rows, sure);
    found.heads[s].index_copy_(0, rows, heads.cpu());
    if (stop) {
      rows = rows.masked_select(sure.lt(options_.threshold()));
      if (rows.numel() == 0) break;
    }
  }
  return found;
}

StagedPrediction ConfidencePolicy::predict(const PolicyBatch& batch) const {
  return run(batch, /*stop=*/true, nullptr);
}

double ConfidencePolicy::fit(const std::vector<PolicyBatch>& batches, double heads) {
  check_batches(batches);
  std::vector<at::Tensor> confidence, cost;
  for (const PolicyBatch& batch : batches) {
    const StagedPrediction found = run(batch, /*stop=*/false, nullptr);
    confidence.push_back(found.confidence.slice(0, 0, -1).to(at::kDouble));  // [S - 1, B]
    cost.push_back(found.heads.to(at::kDouble));                             // [S, B]
  }
  options_.threshold(confidence_threshold(at::cat(confidence, 1), at::cat(cost, 1), heads));
  return threshold();
}

FittedPolicy ConfidencePolicy::fit_accuracy(const std::vector<PolicyBatch>& batches, double loss,
                                            double certainty) {
  TORCH_CHECK_VALUE(certainty >= 0.5 && certainty < 1.0, "certainty must be in [0.5, 1), got ",
                    certainty);
  check_batches(batches);
  std::vector<at::Tensor> sure, right, ran;
  for (const PolicyBatch& batch : batches) {
    std::vector<at::Tensor> stages;
    const StagedPrediction found = run(batch, /*stop=*/false, &stages);
    const at::Tensor predicted = at::stack(stages).argmax(2).cpu();  // [S, B]
    const at::Tensor targets = batch.targets.defined() ? batch.targets.cpu() : predicted[-1];
    TORCH_CHECK_VALUE(
        targets.sizes() == at::IntArrayRef({batch.size}) && !targets.is_floating_point(),
        "targets must be whole numbers [", batch.size, "], got ", targets.scalar_type(), " ",
        targets.sizes());
    sure.push_back(found.confidence.to(at::kDouble));
    right.push_back(predicted.eq(targets));
    ran.push_back(found.heads.to(at::kDouble));
  }
  const at::Tensor confidence = at::cat(sure, 1);  // [S, N]
  const at::Tensor correct = at::cat(right, 1);    // [S, N]
  const at::Tensor heads = at::cat(ran, 1);        // [S, N]
  const double z = at::special_ndtri(at::scalar_tensor(certainty, at::kDouble)).item<double>();
  options_.threshold(accurate_threshold(confidence.slice(0, 0, -1), correct, loss, z));
  const at::Tensor stage = stopping_stage(confidence, threshold()).unsqueeze(0);  // [1, N]
  const auto mean = [](const at::Tensor& values) {
    return values.to(at::kDouble).mean().item<double>();
  };
  return {threshold(), mean(heads.cumsum(0).gather(0, stage)), mean(correct.gather(0, stage)),
          mean(heads[-1]), mean(correct[-1])};
}

}  // namespace headwise

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <sstream>

#include "headwise/analysis.h"
#include "headwise/confidence.h"
#include "headwise/instrument.h"
#include "shown.h"

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

void check_logits(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.defined() && logits.dim() == 2 && logits.size(1) >= 2,
                    "forward_fn must return logits [B, C] of at least 2 classes, got ",
                    logits.defined() ? c10::str("shape ", logits.sizes()) : "no tensor");
  TORCH_CHECK_VALUE(at::isfinite(logits).all().item<bool>(),
                    "forward_fn must return finite logits, got NaN or infinity");
}

void check_batches(size_t count) {
  TORCH_CHECK_VALUE(count > 0, "batches must not be empty: there is nothing to fit a threshold on");
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

ConfidenceStages::ConfidenceStages(std::vector<double> factors, double threshold,
                                   std::string measure)
    : factors_(std::move(factors)), measure_(std::move(measure)) {
  TORCH_CHECK_VALUE(!factors_.empty() && factors_.front() > 0.0 && std::isfinite(factors_.back()) &&
                        std::adjacent_find(factors_.begin(), factors_.end(),
                                           std::greater_equal<>()) == factors_.end(),
                    "factors must be positive and ascending, got ", at::ArrayRef<double>(factors_));
  TORCH_CHECK_VALUE(measure_ == "probability" || measure_ == "margin" || measure_ == "entropy",
                    "measure must be one of probability, margin, entropy, got ",
                    shown(measure_, 100, '\''));
  set_threshold(threshold);
}

void ConfidenceStages::set_threshold(double threshold) {
  TORCH_CHECK_VALUE(!std::isnan(threshold), "threshold must be a number, got NaN");
  threshold_ = threshold;
}

StagedPrediction ConfidenceStages::run(const StageFunction& run, bool stop,
                                       std::vector<at::Tensor>* stages) const {
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(factors_.size());
  StagedPrediction found;
  found.threshold = threshold_;
  at::Tensor rows;  // of the current stage; undefined: all
  for (int64_t s = 0; s < count; ++s) {
    const auto [logits, heads] = run(rows, factors_[s]);
    check_logits(logits);
    const int64_t inputs = s == 0 ? logits.size(0) : rows.numel();
    TORCH_CHECK_VALUE(logits.size(0) == inputs && heads.numel() == inputs,
                      "forward_fn must return logits of the ", inputs, " inputs it is given, got ",
                      logits.size(0));
    if (stages) stages->push_back(logits);
    if (s == 0) {
      rows = at::arange(inputs);
      found.logits = at::empty_like(logits);
      found.stage = at::zeros_like(rows);
      found.confidence = at::full({count, inputs}, std::numeric_limits<float>::quiet_NaN());
      found.heads = at::zeros({count, inputs}, at::kLong);
    }
    const at::Tensor sure = prediction_confidence(logits.to(at::kFloat), measure_).cpu();  // [N]
    found.logits.index_copy_(0, rows.to(logits.device()), logits);
    found.stage.index_fill_(0, rows, s);
    found.confidence[s].index_copy_(0, rows, sure);
    found.heads[s].index_copy_(0, rows, heads.to(at::kCPU, at::kLong));
    if (stop) {
      rows = rows.masked_select(sure.lt(threshold_));
      if (rows.numel() == 0) break;
    }
  }
  return found;
}

StagedPrediction ConfidenceStages::predict(const StageFunction& function) const {
  return run(function, /*stop=*/true, nullptr);
}

double ConfidenceStages::fit(const std::vector<StageFunction>& runs, double heads) {
  check_batches(runs.size());
  std::vector<at::Tensor> confidence, cost;
  for (const StageFunction& function : runs) {
    const StagedPrediction found = run(function, /*stop=*/false, nullptr);
    confidence.push_back(found.confidence.slice(0, 0, -1).to(at::kDouble));  // [S - 1, B]
    cost.push_back(found.heads.to(at::kDouble));                             // [S, B]
  }
  set_threshold(confidence_threshold(at::cat(confidence, 1), at::cat(cost, 1), heads));
  return threshold_;
}

FittedPolicy ConfidenceStages::fit_accuracy(const std::vector<StageFunction>& runs,
                                            const std::vector<at::Tensor>& labels, double loss,
                                            std::optional<double> certainty) {
  check_batches(runs.size());
  TORCH_CHECK_VALUE(labels.size() == runs.size(), "labels must be given for each of the ",
                    runs.size(), " batches, got ", labels.size());
  std::vector<at::Tensor> sure, right, ran;
  for (size_t i = 0; i < runs.size(); ++i) {
    std::vector<at::Tensor> stages;
    const StagedPrediction found = run(runs[i], /*stop=*/false, &stages);
    const at::Tensor predicted = at::stack(stages).argmax(2).cpu();  // [S, B]
    const at::Tensor own = labels[i].defined() ? labels[i].cpu() : predicted[-1];
    TORCH_CHECK_VALUE(own.sizes() == predicted[-1].sizes() && !own.is_floating_point(),
                      "labels must be whole numbers [", predicted.size(1), "], got ",
                      own.scalar_type(), " ", own.sizes());
    sure.push_back(found.confidence.to(at::kDouble));
    right.push_back(predicted.eq(own));
    ran.push_back(found.heads.to(at::kDouble));
  }
  const at::Tensor confidence = at::cat(sure, 1);  // [S, N]
  const at::Tensor correct = at::cat(right, 1);    // [S, N]
  const at::Tensor heads = at::cat(ran, 1);        // [S, N]
  set_threshold(accurate_threshold(confidence.slice(0, 0, -1), correct, loss, certainty));
  const at::Tensor stage = stopping_stage(confidence, threshold_).unsqueeze(0);  // [1, N]
  const auto mean = [](const at::Tensor& values) {
    return values.to(at::kDouble).mean().item<double>();
  };
  return {threshold_, mean(heads.cumsum(0).gather(0, stage)), mean(correct.gather(0, stage)),
          mean(heads[-1]), mean(correct[-1])};
}

ConfidencePolicy::ConfidencePolicy(AttentionLayers layers, ConfidencePolicyOptions options)
    : layers_(std::move(layers)),
      ranking_(options.ranking()),
      stages_(options.factors(), options.threshold(), options.measure()) {
  TORCH_CHECK_VALUE(
      std::any_of(layers_.begin(), layers_.end(),
                  [](const auto& item) { return item.second->options.num_heads() > 0; }),
      "layers must have attention heads, got none");
  for (const auto& [name, layer] : layers_) {
    const at::Tensor scores = known(ranking_, name);
    const int64_t heads = layer->options.num_heads();
    TORCH_CHECK_VALUE(!scores.defined() || scores.numel() == heads, "ranking must have ", heads,
                      " heads for ", layer_called(name), ", got ", scores.numel());
    const bool silent =
        !layer->gate || dynamic_cast<const FixedGateImpl*>(layer->gate.get()) != nullptr;
    TORCH_CHECK_VALUE(scores.defined() || !silent, layer_called(name),
                      " has no relevance of its own: ranking must have scores for it");
  }
}

StageFunction ConfidencePolicy::stage_function(const PolicyBatch& batch) const {
  TORCH_CHECK_VALUE(batch.size > 0 && batch.forward_fn,
                    "batch must have a forward_fn and at least one input, got ", batch.size);
  return [this, batch](const at::Tensor& rows, double factor) {
    at::Tensor total;  // int64 [N]
    Instrumented opened(layers_);
    opened.override_with([&](size_t i, int64_t, const at::TensorOptions&, const Choose& choose) {
      Selection selection = choose();
      if (factor != 1.0) {
        const std::string& name = layers_[i].first;
        at::Tensor relevance = selection.relevance;  // [B, H]
        if (!relevance.defined()) {
          const at::Tensor scores = known(ranking_, name);
          TORCH_CHECK_VALUE(scores.defined(), layer_called(name),
                            " has no relevance: ranking must have scores for it");
          relevance = scores.to(selection.weight.options()).expand_as(selection.weight);
        }
        selection = widen_selection(selection, relevance, factor);
      }
      const at::Tensor count = selection.count.to(at::kLong);
      total = total.defined() ? total + count : count;
      return selection;
    });
    const at::Tensor logits = batch.forward_fn(rows.defined() ? rows : at::arange(batch.size));
    TORCH_CHECK_VALUE(total.defined(), "forward_fn must call the layers: none was called");
    return std::pair(logits, total);
  };
}

std::vector<StageFunction> ConfidencePolicy::stage_functions(
    const std::vector<PolicyBatch>& batches) const {
  std::vector<StageFunction> found;
  for (const PolicyBatch& batch : batches) found.push_back(stage_function(batch));
  return found;
}

StagedPrediction ConfidencePolicy::predict(const PolicyBatch& batch) const {
  return stages_.predict(stage_function(batch));
}

double ConfidencePolicy::fit(const std::vector<PolicyBatch>& batches, double heads) {
  return stages_.fit(stage_functions(batches), heads);
}

FittedPolicy ConfidencePolicy::fit_accuracy(const std::vector<PolicyBatch>& batches, double loss,
                                            std::optional<double> certainty) {
  std::vector<at::Tensor> labels;
  for (const PolicyBatch& batch : batches) labels.push_back(batch.labels);
  return stages_.fit_accuracy(stage_functions(batches), labels, loss, certainty);
}

}  // namespace headwise

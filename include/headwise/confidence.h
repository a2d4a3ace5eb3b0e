// A head budget that follows the confidence of the prediction, as headwise.ConfidencePolicy does in
// Python: every input first runs a few of the heads that its gates rank highest; if the prediction
// is not confident enough, it runs again with more of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "headwise/export.h"
#include "headwise/importance.h"
#include "headwise/layers.h"

namespace headwise {

/// Options of a ConfidencePolicy.
struct HEADWISE_API ConfidencePolicyOptions {
  /// Factors of the budget of each stage, positive and ascending; 1 is the gates' own choice.
  TORCH_ARG(std::vector<double>, factors) = { 0.5, 1.0 };
  /// An input whose confidence reaches it stops.
  TORCH_ARG(double, threshold) = 0.9;
  /// "probability", "margin" or "entropy": see prediction_confidence.
  TORCH_ARG(std::string, measure) = "probability";
  /// Importance of heads, for layers whose gates have no relevance.
  TORCH_ARG(std::optional<HeadScores>, ranking) = std::nullopt;
};

/// The result of a policy on a batch of B inputs, after S stages.
struct HEADWISE_API StagedPrediction {
  at::Tensor logits;      ///< [B, C], of the stage at which each input stopped
  at::Tensor stage;       ///< int64 [B], that stage
  at::Tensor confidence;  ///< [S, B], after every stage; NaN if the input stopped before
  at::Tensor heads;       ///< int64 [S, B], heads of all layers that each stage ran
  double threshold = 0;   ///< the required confidence

  /// int64 [B]: heads that each input ran, all stages together.
  at::Tensor total_heads() const;
  /// Why input `row` ran this number of heads, in words.
  std::string reason(int64_t row) const;
};

/// The result of ConfidencePolicy::fit_accuracy, on the given data.
struct HEADWISE_API FittedPolicy {
  double threshold = 0;        ///< now set in the policy
  double heads = 0;            ///< mean heads of an input, all stages together
  double accuracy = 0;         ///< of the policy
  double widest_heads = 0;     ///< mean heads of the widest stage alone
  double widest_accuracy = 0;  ///< of the widest stage alone
  /// Whether the policy runs fewer heads than the widest stage alone.
  bool pays() const { return heads < widest_heads; }
};

/// Runs the model on some inputs of a batch with `factor` times as many heads as its gates give.
/// @param rows int64 [N], on the CPU; undefined: all
/// @returns logits [N, C], and how many heads of all layers ran for each input, integer [N]
using StageFunction =
    std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor& rows, double factor)>;

/// The stages of a confidence policy and its threshold: which inputs to run again, and what that
/// costs. The model is its owner's; ConfidencePolicy owns it here, headwise.ConfidencePolicy in
/// Python.
class HEADWISE_API ConfidenceStages {
 public:
  /// @throws c10::ValueError for factors that are not positive and ascending, a threshold that is
  ///         NaN, or an unknown measure
  ConfidenceStages(std::vector<double> factors, double threshold, std::string measure);

  /// Logits of every input, each at the budget at which it was confident enough.
  /// @throws c10::ValueError for logits that are not [N, C] of at least 2 classes, or not finite
  StagedPrediction predict(const StageFunction& run) const;

  /// Sets the threshold to the largest at which inputs run `heads` heads on average, and returns
  /// it: infinity if every input may run every stage.
  /// @param runs one per batch
  /// @throws c10::ValueError for no batches, or fewer heads than the first stage alone runs
  double fit(const std::vector<StageFunction>& runs, double heads);

  /// Sets the threshold to the smallest that loses at most `loss` of the accuracy of the widest
  /// stage: see accurate_threshold.
  /// @param labels int64 [B] of each batch; undefined: the predictions of the widest stage
  /// @param certainty in (0, 1): the probability with which that must hold for all inputs; none: on
  ///        these batches, without a bound for other data
  /// @throws c10::ValueError for no batches, loss or certainty out of range, or labels that are not
  ///         whole numbers [B]
  FittedPolicy fit_accuracy(const std::vector<StageFunction>& runs,
                            const std::vector<at::Tensor>& labels, double loss = 0.01,
                            std::optional<double> certainty = {});

  double threshold() const { return threshold_; }
  void set_threshold(double threshold);
  const std::vector<double>& factors() const { return factors_; }
  const std::string& measure() const { return measure_; }

 private:
  StagedPrediction run(const StageFunction& run, bool stop, std::vector<at::Tensor>* stages) const;

  std::vector<double> factors_;
  double threshold_;
  std::string measure_;
};

/// A batch of inputs for a policy.
struct HEADWISE_API PolicyBatch {
  int64_t size = 0;  ///< of inputs
  /// Runs the model, in evaluation mode, on the inputs `rows` (int64 [N]) -> logits [N, C].
  std::function<at::Tensor(const at::Tensor& rows)> forward_fn;
  at::Tensor labels;  ///< int64 [size]; undefined: the predictions of the widest stage
};

/// Runs a model on a small head budget, and on wider ones if it is not confident.
///
/// Stage s multiplies the number of heads that each gate gives an input by factors[s] (rounded,
/// half up; at least one head if the gate gave any, at most all), by the gate's own relevance, or
/// by `ranking` if it has none. Heads that the gate chose keep their weight; added ones have weight
/// 1. A later stage runs the model again: the cost of an input is the sum of its stages.
class HEADWISE_API ConfidencePolicy {
 public:
  /// @throws c10::ValueError as ConfidenceStages, for layers without heads, or for a layer that
  ///         `ranking` lacks and whose gate has no relevance of its own
  explicit ConfidencePolicy(AttentionLayers layers, ConfidencePolicyOptions options = {});

  /// As in ConfidenceStages.
  StagedPrediction predict(const PolicyBatch& batch) const;
  double fit(const std::vector<PolicyBatch>& batches, double heads);
  FittedPolicy fit_accuracy(const std::vector<PolicyBatch>& batches, double loss = 0.01,
                            std::optional<double> certainty = {});

  double threshold() const { return stages_.threshold(); }

 private:
  StageFunction stage_function(const PolicyBatch& batch) const;
  std::vector<StageFunction> stage_functions(const std::vector<PolicyBatch>& batches) const;

  AttentionLayers layers_;
  std::optional<HeadScores> ranking_;
  ConfidenceStages stages_;
};

/// A gate's choice with `factor` times the number of heads (rounded, half up; at least one if there
/// were any, at most all), by `relevance`. Heads that had a weight keep it; the others get 1.
/// torch.ops.headwise.widen_selection gives index, count and weight.
/// @param relevance [B, H], finite
HEADWISE_API Selection widen_selection(const Selection& selection, const at::Tensor& relevance,
                                       double factor);

/// The first stage of each example whose confidence reaches the threshold; the last if none does.
/// @param confidence [S, N] @returns int64 [N]
HEADWISE_API at::Tensor stopping_stage(const at::Tensor& confidence, double threshold);

}  // namespace headwise

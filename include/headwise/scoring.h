// Scores of the heads of a whole model, and steps of pruning it by them.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/importance.h"
#include "headwise/layers.h"
#include "headwise/pruning.h"

namespace headwise {

/// How heads are scored.
struct HEADWISE_API ScoreOptions {
  /// The level at which michel takes the absolute value.
  TORCH_ARG(AbsoluteValue, absolute) = AbsoluteValue::per_token;
  /// Divide each layer's michel by its L2 norm.
  TORCH_ARG(bool, normalize) = true;
  /// The share of importance in hies, in [0, 1].
  TORCH_ARG(double, alpha) = 0.5;
  /// The heads over which hies scales.
  TORCH_ARG(Scope, scope) = Scope::model;
};

/// Scores every head by all metrics ("michel", "entropy", "attention_confidence", "hies"), in one
/// pass over the data. The owner of the model runs it, and passes each layer's probe to see() and
/// the loss of each batch to add(). score_heads does this here, headwise.score_heads in Python.
class HEADWISE_API HeadScorer {
 public:
  /// @throws c10::ValueError on no or an unknown metric
  explicit HeadScorer(std::vector<std::string> metrics = {"michel"}, ScoreOptions options = {});
  /// Whether the loss is differentiated: gradients must be enabled, and probes have a context.
  bool needs_gradients() const { return gradients_; }
  /// What a layer computed in the current forward.
  void see(const std::string& layer, const AttentionProbe& probe);
  /// Ends a batch.
  /// @param loss of the examples [B], or their mean [], which is multiplied by the batch size;
  ///        undefined: loss_fn returned no tensor
  /// @throws c10::ValueError on a loss that is not finite, of another shape, or does not depend on
  ///         the heads
  void add(const at::Tensor& loss);
  /// By metric. @throws c10::ValueError on no batches
  std::map<std::string, HeadScores> scores() const;

 private:
  struct Call {
    std::string layer;
    at::Tensor context;                 // [B, H, L, d]
    std::optional<at::Tensor> padding;  // bool [B, L]
  };

  std::vector<std::string> metrics_;
  ScoreOptions options_;
  bool gradients_, statistics_;
  HeadScoreAccumulator sums_;
  std::vector<Call> calls_;  // of the current batch
  int64_t batches_ = 0;
};

/// Scores every head of a model's layers. Gates stay active; gradients of parameters are left
/// alone.
/// @param batches how many there are: loss_fn(0) to loss_fn(batches - 1)
/// @param loss_fn as HeadScorer::add takes it
/// @returns by metric
/// @throws c10::ValueError as HeadScorer does
HEADWISE_API std::map<std::string, HeadScores> score_heads(
    const AttentionLayers& layers, int64_t batches, const BatchLoss& loss_fn,
    const std::vector<std::string>& metrics = {"michel"}, const ScoreOptions& options = {});

}  // namespace headwise

// Scores of the heads of a whole model, and pruning by steps: what headwise.score_heads and
// headwise.pruning_path do in Python, with the same numbers.
#pragma once

#include <torch/arg.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/importance.h"
#include "headwise/kwon.h"
#include "headwise/layers.h"
#include "headwise/pruning.h"

namespace headwise {

/// How heads are scored.
struct HEADWISE_API ScoreOptions {
  /// Where michel takes the absolute value.
  TORCH_ARG(AbsoluteValue, absolute) = AbsoluteValue::per_token;
  /// Divide each layer's michel by its L2 norm.
  TORCH_ARG(bool, normalize) = true;
  /// The share of importance in hies, in [0, 1].
  TORCH_ARG(double, alpha) = 0.5;
  /// Over what hies scales.
  TORCH_ARG(Scope, scope) = Scope::global;
};

/// Scores every head by all `metrics` ("michel", "entropy", "confidence", "hies"), in one pass over
/// the batches. Gates stay in force; gradients of parameters are left alone.
/// @param batches how many there are: loss(0) to loss(batches - 1)
/// @param loss    of the examples [B], or their mean [], which is multiplied by the batch size
/// @returns by metric
/// @throws c10::ValueError on an unknown metric, no batches, or a loss that is not finite, of
///         another shape, or does not depend on the heads
HEADWISE_API std::map<std::string, HeadScores> score_heads(
    const AttentionLayers& layers, int64_t batches, const BatchLoss& loss,
    const std::vector<std::string>& metrics = {"michel"}, const ScoreOptions& options = {});

/// How heads are pruned by steps.
struct HEADWISE_API PruningPathOptions {
  /// The fraction of all heads that one step removes, in (0, 1]; at least one head.
  TORCH_ARG(double, step) = 0.1;
  /// Score what is left anew after every step.
  TORCH_ARG(bool, exact) = true;
  /// What to score by.
  TORCH_ARG(std::string, metric) = "michel";
  /// Heads that every layer keeps (all, where it has fewer).
  TORCH_ARG(int64_t, min_heads_per_layer) = 0;
  /// Of the scores.
  TORCH_ARG(ScoreOptions, scoring);
};

/// Plans that remove the least important heads step by step, the last one keeping `keep` (Michel et
/// al. 2019, arXiv 1905.10650, section 4). Every plan keeps a subset of the one before.
/// @throws c10::ValueError on an option out of range, a layer that has a gate, or what score_heads
///         and plan refuse; the layers are then as they were
HEADWISE_API std::vector<HeadPlan> pruning_path(const AttentionLayers& layers, int64_t batches,
                                                const BatchLoss& loss, double keep = 0.5,
                                                const PruningPathOptions& options = {});

/// How many heads of `total` are left after each step of a pruning path: round(step * total) go at
/// a time, but at least one, and round(keep * total) stay in the end, but at least one.
/// @throws c10::ValueError if keep or step is outside (0, 1]
HEADWISE_API std::vector<int64_t> pruning_counts(int64_t total, double keep, double step);

/// The `count` heads of `before` that score best.
/// @param scores of the heads that `before` keeps, in their order, for each of its layers
/// @throws c10::ValueError if they are not as many, or what plan refuses
HEADWISE_API HeadPlan narrowed(const HeadPlan& before, const HeadScores& scores, int64_t count,
                               int64_t min_heads_per_layer = 0);

/// Gradients of the mean loss with respect to the masks of all heads, a row a batch: their Fisher
/// information is what Kwon et al. 2022 (arXiv 2204.09656, section 3.2) search with.
/// @throws c10::ValueError as score_heads
HEADWISE_API FisherAccumulator fisher_gradients(const AttentionLayers& layers, int64_t batches,
                                                const BatchLoss& loss);

/// The heads that stay when a share `macs` of the multiply-accumulates of heads may be spent, by
/// Fisher information; the steps 1 to 3 of headwise.kwon_prune, for heads alone. Heads of all
/// layers cost the same. Scales are 1; ScaleSolver finds better ones.
/// @param macs in (0, 1]
/// @param rearrange_heads exchange heads of a layer by its block of the Fisher matrix
/// @throws c10::ValueError as score_heads, for a share out of range, a layer that has a gate, or
///         layers of different widths
HEADWISE_API HeadPlan kwon_plan(const AttentionLayers& layers, int64_t batches,
                                const BatchLoss& loss, double macs, bool rearrange_heads = true);

}  // namespace headwise

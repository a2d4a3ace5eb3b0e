// Ablation: what a model loses without a head, or in a layer that has only one. The same numbers as
// headwise.ablate_heads and headwise.keep_one_head in Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "headwise/export.h"
#include "headwise/importance.h"
#include "headwise/layers.h"

namespace headwise {

/// The paired bootstrap of an ablation.
struct HEADWISE_API AblationOptions {
  /// Resamples.
  TORCH_ARG(int64_t, resamples) = 1000;
  /// Of the intervals, in (0, 1).
  TORCH_ARG(double, confidence) = 0.95;
  /// Of the resamples.
  TORCH_ARG(int64_t, seed) = 0;
};

/// What heads are worth, measured. Vectors are by layer and head, as HeadScores::values.
struct HEADWISE_API Ablation {
  HeadScores scores;                         ///< the larger, the more a head is worth
  std::vector<std::vector<double>> low;      ///< lower end of the score's bootstrap interval
  std::vector<std::vector<double>> high;     ///< its upper end
  std::vector<std::vector<double>> p_value;  ///< two-sided, of the score being 0
  at::Tensor losses;                         ///< float64 [N], of the whole model on every example

  /// {layer, head} of the scores that differ from 0 with p < `level`.
  std::vector<std::pair<std::string, int64_t>> significant(double level = 0.01) const;
};

/// What the model loses when one head alone is taken out, for every head (Michel et al. 2019, arXiv
/// 1905.10650, section 3.2): the mean over the examples of the loss without it minus the loss with
/// it. Gates stay in force; heads that they do not choose have score 0.
/// @param batches how many there are; each is run once for every head
/// @throws c10::ValueError on no batches, a loss that is not finite or not [B], or one that no head
///         changes; the layers are then as they were
HEADWISE_API Ablation ablate_heads(const AttentionLayers& layers, int64_t batches,
                                   const BatchLoss& loss, const AblationOptions& options = {});

/// What the model loses when a layer has one head only, for every head of every layer (section
/// 3.3): the mean loss of the whole model minus that with only this head in its layer.
HEADWISE_API Ablation keep_one_head(const AttentionLayers& layers, int64_t batches,
                                    const BatchLoss& loss, const AblationOptions& options = {});

}  // namespace headwise

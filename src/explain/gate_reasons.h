// Why a gate chose as it did in one call, from its parameters: the reasons in an explanation.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "explain/competition.h"
#include "headwise/multihead_attention.h"
#include "headwise/weights.h"
#include "json.h"

namespace headwise {

/// Undefined tensors: the gate has no such value. NaN: it has none for that head.
struct GateReasons {
  std::string type;  ///< "none" without a gate
  std::string how;   ///< how it decides, in a sentence
  /// How relevance decides: "rank" (the `count` largest), "threshold" (all above it), "awake" (the
  /// largest when training last moved heads), "random" (the largest of numbers drawn at random),
  /// "fixed" (no relevance), "none" (no gate) or "other".
  std::string rule;
  double threshold = 0;                               ///< if rule is "threshold"
  int64_t among = 0;                                  ///< heads that relevance ranks
  at::Tensor chosen;                                  ///< bool [B, H]
  at::Tensor weight;                                  ///< [B, H]
  at::Tensor relevance, rank, margin, budget_needed;  ///< [B, H]
  at::Tensor shares, constant;                        ///< [B, H, L], [B, H]
  at::Tensor budget, count;                           ///< [B]
  at::Tensor attribution, baseline, asked;            ///< [B, L], [B], [B]
  double min_budget = 0, max_budget = 1;
  /// Set if ranks, margins and needed budgets come from standings() over all calls.
  std::optional<Contestant> contestant;
};  // everything float64 on the host, except `chosen`

/// @param config tagged JSON of the gate's configuration, "" without a gate
/// @param layer  name of the layer
/// @param steps  of integrated gradients
GateReasons gate_reasons(const std::string& config, const NamedTensors& tensors,
                         const AttentionProbe& probe, const std::string& layer, int64_t num_heads,
                         int64_t steps);

}  // namespace headwise

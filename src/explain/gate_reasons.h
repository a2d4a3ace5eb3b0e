// What a gate's parameters say about one call of it: the reasons of an explanation.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "headwise/multihead_attention.h"
#include "headwise/weights.h"
#include "json.h"

namespace headwise {

/// Undefined tensors: the gate has nothing of the kind.
struct GateReasons {
  std::string type;  ///< "none" without a gate
  /// How relevance decides: "rank" (the `count` largest), "threshold" (all above it), "random" (the
  /// largest of numbers drawn at random), "fixed" (no relevance) or "none" (no gate), "other".
  std::string rule;
  double threshold = 0;                               ///< where rule is "threshold"
  at::Tensor chosen;                                  ///< bool [B, H]
  at::Tensor weight;                                  ///< [B, H]
  at::Tensor relevance, rank, margin, budget_needed;  ///< [B, H]
  at::Tensor shares, constant;                        ///< [B, H, L], [B, H]
  at::Tensor budget, count;                           ///< [B]
  at::Tensor attribution, baseline, asked;            ///< [B, L], [B], [B]
  double min_budget = 0, max_budget = 1;
};  // everything float64 on the host, except `chosen`

/// @param config tagged JSON of the gate's configuration, "" without a gate
/// @param steps  of integrated gradients
GateReasons gate_reasons(const std::string& config, const NamedTensors& tensors,
                         const AttentionProbe& probe, int64_t num_heads, int64_t steps);

}  // namespace headwise

// Heads that compete across the layers of a model: the rank of each among all of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "json.h"

namespace headwise {

/// What a gate with learned scores decided in one call of its layer, for R heads: all of the
/// layer's, or those that a SharedHeadsGate leaves to it.
struct Contestant {
  std::string layer;
  Json config;                   ///< of the gate
  at::Tensor heads;              ///< int64 [R], their numbers in the layer
  at::Tensor relevance, chosen;  ///< float64 and bool [B, R]
  at::Tensor base, tilt, asked;  ///< [R], [R], [B]: of RequestedBudgetGate
};

/// The ranks of the heads of one call; undefined tensors: unknown.
struct Standing {
  int64_t among = 0;        ///< heads that compete
  at::Tensor rank, margin;  ///< float64 [B, R], among all that compete
  at::Tensor budget_needed;
};

/// Whether the gate's heads compete with heads of other calls, so that one call alone does not give
/// their ranks.
bool competes(const std::string& type);

/// Gates of scope "model" with equal options compete with each other, others within their layer. A
/// layer that is called several times takes part once.
std::vector<Standing> standings(const std::vector<std::optional<Contestant>>& sites);

}  // namespace headwise

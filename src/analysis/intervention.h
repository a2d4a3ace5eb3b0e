// Changing what gates chose, for as long as an object lives.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "headwise/layers.h"

namespace headwise::analysis {

using Change = std::function<Selection(const Selection&)>;

/// Every layer's selections go through `changes`, one a layer; a layer without a gate selects all
/// its heads first. The layers are afterwards as they were.
class Intervention {
 public:
  Intervention(const AttentionLayers& layers, std::vector<Change> changes);
  ~Intervention();
  Intervention(const Intervention&) = delete;
  Intervention& operator=(const Intervention&) = delete;

 private:
  AttentionLayers layers_;
  std::vector<std::shared_ptr<GateImpl>> gates_;  // those that they had
};

/// Multiplies weights by `factor` [H]; heads of factor 0 do not run, unless a gradient has to reach
/// the factor.
Selection scaled(const Selection& selection, const at::Tensor& factor);

/// A factor for every head's output, one tensor [H] a layer, ones at first.
class ScaledHeads {
 public:
  explicit ScaledHeads(const AttentionLayers& layers);
  std::vector<at::Tensor> factors;

 private:
  Intervention intervention_;
};

/// float64 [N], on the CPU: the loss of every example.
/// @throws c10::ValueError on no batches, or a loss that is not finite or not [B]
at::Tensor example_losses(int64_t batches, const BatchLoss& loss);

}  // namespace headwise::analysis

// What gates share that decide together.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "headwise/gates.h"

namespace headwise {

/// The gates of one model that decide as one, in the model's order. It holds their tensors, not the
/// gates: a gate that has been taken out of the model stays counted until link_gates is called
/// again.
struct GateScope {
  /// What each gate scores its heads with [H]; one after the other they are the model's [N].
  std::vector<at::Tensor> scores;
  /// RequestedBudgetGate: how the scores move with the budget [H].
  std::vector<at::Tensor> tilts;
  /// SleepGate: which heads are awake, 1 or 0 [H]; the training forwards so far []; the weights of
  /// the last one [B, H]; and what moved.
  std::vector<at::Tensor> awake, steps, weights;
  std::vector<HeadMove> moves;

  int64_t num_heads() const {
    int64_t total = 0;
    for (const auto& part : scores) total += part.size(0);
    return total;
  }

  /// Where the heads of the gate at `position` begin among the model's.
  int64_t start(int64_t position) const {
    int64_t before = 0;
    for (int64_t i = 0; i < position; ++i) before += scores[i].size(0);
    return before;
  }

  /// What is drawn once for a training forward of the model: the gate that asks a second time
  /// begins the next forward, so no gate need know which one comes first.
  const std::vector<at::Tensor>& draw(int64_t position,
                                      const std::function<std::vector<at::Tensor>()>& make) {
    if (served_.empty() || served_[position]) {
      drawn_ = make();
      served_.assign(scores.size(), false);
    }
    served_[position] = true;
    return drawn_;
  }

 private:
  std::vector<at::Tensor> drawn_;
  std::vector<bool> served_;
};

}  // namespace headwise

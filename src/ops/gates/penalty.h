// The regulariser of all the gates of a model.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace headwise {

/// One gate with a target, after a training forward.
struct TargetTerm {
  at::Tensor expected_heads;  ///< [B]
  int64_t num_heads;
  std::string type;  ///< of the gate
  bool pooled;       ///< shares its target with gates of the same type and target
  at::Tensor progress;
  double keep, initial_keep, warmup, strength;
  std::string form;
  std::optional<at::Tensor> multipliers;  ///< [2], for the form "lagrangian"
  std::optional<at::Tensor> regulariser;  ///< [], what belongs to this gate alone
};

/// The sum of one target_penalty for each pool, and the mean of what belongs to single gates: their
/// regularisers, with the penalty of their own target if they are not pooled, and `others` [] each.
/// On the device of the first -> [].
at::Tensor gates_penalty(const std::vector<TargetTerm>& terms,
                         const std::vector<at::Tensor>& others);

}  // namespace headwise

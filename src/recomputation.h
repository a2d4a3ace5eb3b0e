// Activation checkpointing: forwards that are repeated inside a backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "headwise/export.h"

namespace headwise {

/// Whether this forward repeats an earlier one, whose activations were not kept. Then it must
/// compute what the earlier one did and leave all state as it is.
HEADWISE_API bool recomputing();

/// Whether this forward may be repeated: saved-tensor hooks are set, or gradients are off.
HEADWISE_API bool may_be_recomputed();

/// What recent training forwards of one gate used, for the forwards that repeat them. Nothing tells
/// a repeated forward which one it repeats, except its input: the values kept are those of the
/// nearest input.
class Replay {
 public:
  struct Used {
    std::vector<at::Tensor> tensors;
    bool differentiable = true;  ///< gradients were on
    bool flag = false;           ///< whatever else the gate has to know
  };

  void remember(const at::Tensor& x, Used used);
  /// Null if nothing was kept.
  const Used* recall(const at::Tensor& x) const;

 private:
  struct Entry {
    at::Tensor mark;  // [D]: tells inputs apart
    Used used;
  };
  std::deque<Entry> kept_;
};

}  // namespace headwise

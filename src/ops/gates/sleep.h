// Operators of the sleep gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

namespace headwise {

/// The scores by which heads are ranked when they may move: the score of a head that is awake
/// counts 1 + margin times. score, awake [N] or alike -> float64
at::Tensor held_score(const at::Tensor& score, const at::Tensor& awake, double margin);

/// Which `count` of N heads are awake, 1 or 0 in the dtype of `awake` [N]: those of largest
/// held_score (ties: the lower head).
at::Tensor awake_heads(const at::Tensor& score, const at::Tensor& awake, int64_t count,
                       double margin);

/// The running average of head scores [H] after one more training step: decay * score + (1 - decay)
/// * sum_b |gradient|, gradient [B, H] = dL/dweight of a mean loss; the first step replaces it. A
/// gradient that is not finite changes nothing.
at::Tensor update_head_score(const at::Tensor& score, const at::Tensor& gradient, double decay,
                             bool first);

}  // namespace headwise

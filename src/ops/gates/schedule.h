// Schedules over `progress`, a tensor: annealing changes a buffer's value and nothing that a
// compiler has specialised on.
#pragma once

#include <ATen/core/Tensor.h>

namespace headwise {

/// 1 where progress [] >= when, else 0, in `dtype`.
at::Tensor reached(const at::Tensor& progress, double when, at::ScalarType dtype);

/// The offset of a budget's logit: an answer of `keep` starts at `initial`, and the offset falls
/// linearly to 0 at progress = warmup.
at::Tensor warmup_logit(const at::Tensor& progress, double initial, double keep, double warmup,
                        at::ScalarType dtype);

/// The value of warmup_logit() at progress 0: logit(initial) - logit(keep), both held in [1e-3,
/// 1 - 1e-3].
double warmup_start(double initial, double keep);

/// The target share of heads: `initial` at progress 0, `keep` from `warmup` on.
at::Tensor scheduled_target(const at::Tensor& progress, double initial, double keep, double warmup,
                            at::ScalarType dtype);

}  // namespace headwise

// The formulas of an evaluated budget gate, one number at a time, for the kernels of the host and
// of the device. They are those of src/ops/gates/budget.cpp and src/ops/gates/selection_ops.cpp,
// which also have gradients; tests compare the two. C: the type of the sums, float or double.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/host_device.h"

namespace headwise::kernels {

/// What the sum over a sequence's tokens is multiplied by to give their mean; without a token the
/// mean is zeros: masked_mean().
template <typename C>
HEADWISE_HOST_DEVICE C inverse_tokens(C tokens) {
  return tokens == C(0) ? C(1) : C(1) / tokens;
}

/// standardize() multiplies the difference from the mean by this.
template <typename C>
HEADWISE_HOST_DEVICE C inverse_spread(C variance) {
  return C(1) / std::sqrt(variance + static_cast<C>(1e-4));
}

template <typename C>
HEADWISE_HOST_DEVICE C gelu(C x) {
  return x * static_cast<C>(0.5) * (C(1) + std::erf(x * static_cast<C>(0.70710678118654752440)));
}

/// gelu() and its derivative.
template <typename C>
struct Activation {
  C value, slope;
};
template <typename C>
HEADWISE_HOST_DEVICE Activation<C> gelu_with_slope(C x) {
  const C below = C(0.5) * (C(1) + std::erf(x * static_cast<C>(0.70710678118654752440)));
  const C density = static_cast<C>(0.39894228040143267794) * std::exp(x * x * C(-0.5));
  return {x * below, below + x * density};
}

/// The budget of a logit: head_budget(). `start` is added at progress 0 and falls to 0 at `warmup`.
template <typename C>
HEADWISE_HOST_DEVICE C budget_of_logit(C logit, C progress, double warmup, double start,
                                       double min_budget, double max_budget) {
  if (warmup > 0) {
    const C left = C(1) - progress / static_cast<C>(warmup);
    if (left > C(0)) logit += left * static_cast<C>(start);
  }
  const C asked = C(1) / (C(1) + std::exp(-logit));
  const C low = static_cast<C>(min_budget), high = static_cast<C>(max_budget);
  return asked < low ? low : (asked > high ? high : asked);
}

/// Heads of a budget in (0, 1]: budget_count().
template <typename C>
HEADWISE_HOST_DEVICE int64_t heads_of_budget(C budget, int64_t heads, int64_t min_heads,
                                             bool round_up) {
  C wanted = budget * static_cast<C>(heads);
  if (wanted != wanted) wanted = 0;
  const C whole = round_up ? std::ceil(wanted - static_cast<C>(1e-4))
                           : std::floor(wanted + static_cast<C>(0.5));
  const int64_t least = min_heads < heads ? min_heads : heads;
  if (!(whole > static_cast<C>(least))) return least;
  return whole < static_cast<C>(heads) ? static_cast<int64_t>(whole) : heads;
}

}  // namespace headwise::kernels

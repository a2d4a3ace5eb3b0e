// How gates choose the heads of one sequence, with derivatives. The formulas are those of
// src/ops/gates/{budget,hard_concrete,gumbel_sigmoid}.cpp, which run on every device; tests compare
// the two. C: float or double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace headwise::kernels {

template <typename C>
C sigmoid(C x) {
  return C(1) / (C(1) + std::exp(-x));
}

/// soft_top_k() of one row: weights [n] that sum to `mass`, and their derivatives:
/// d weight[h] / d score[j] = slope[h] ((h == j) - share slope[j]),
/// d weight[h] / d mass = share slope[h]. `start` is a guess of the threshold. Returns `share`.
template <typename C>
C soft_top_k(const C* scores, int64_t n, C mass, C tau, C start, C* weight, C* slope) {
  if (mass >= static_cast<C>(n)) {  // its root is at minus infinity: every head, exactly
    std::fill_n(weight, n, C(1));
    std::fill_n(slope, n, C(0));
    return C(0);
  }
  constexpr C kSaturation = 20, kFlat = static_cast<C>(1e-6),
              kExact = std::numeric_limits<C>::epsilon();
  C low = *std::min_element(scores, scores + n) - kSaturation * tau;
  C high = *std::max_element(scores, scores + n) + kSaturation * tau;
  C t = std::clamp(start, low, high), spread = 0;
  // Newton's steps, and halves of the interval where the sum is flat.
  for (int step = 0; step < 100; ++step) {
    C sum = 0;
    spread = 0;
    for (int64_t h = 0; h < n; ++h) {
      const C open = sigmoid((scores[h] - t) / tau);
      weight[h] = open;
      sum += open;
      spread += open * (C(1) - open);
    }
    const C off = sum - mass;
    if (std::abs(off) <= 2 * kExact * std::max(mass, C(1))) break;
    (off > 0 ? low : high) = t;
    C next = t + off * tau / std::max(spread, kFlat * kFlat);
    if (!(next > low && next < high)) next = low + (high - low) / 2;
    if (std::abs(next - t) <= kExact * (std::abs(t) + tau)) break;
    t = next;
  }
  for (int64_t h = 0; h < n; ++h) slope[h] = weight[h] * (C(1) - weight[h]) / tau;
  // Where the sum is flat its derivative is bounded, as that of soft_top_k()'s two steps is.
  const C held = std::max(spread, kFlat);
  return (C(2) - spread / held) * tau / held;
}

/// A sample's logistic noise of a uniform number.
template <typename C>
C logistic(C u) {
  return std::log(u) - std::log1p(-u);
}

template <typename C>
struct Weight {
  C value, slope;  ///< and its derivative
};

/// hard_concrete(), of s = sigmoid(x); x moves by `rate` with log_alpha.
template <typename C>
Weight<C> hard_concrete(C x, C rate, C gamma, C zeta) {
  const C s = sigmoid(x), stretched = s * (zeta - gamma) + gamma;
  const bool inside = stretched >= C(0) && stretched <= C(1);
  return {std::clamp(stretched, C(0), C(1)),
          inside ? s * (C(1) - s) * (zeta - gamma) * rate : C(0)};
}

}  // namespace headwise::kernels

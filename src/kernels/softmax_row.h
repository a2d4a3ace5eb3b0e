// A row of softmax scores, reduced piece by piece without storing it to what its entropy and
// largest probability need. Shared by the host and the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host_device.h"

namespace headwise::kernels {

/// Scores s_j seen so far, m their maximum: sum of exp(s_j - m), and of exp(s_j - m) (s_j - m).
/// A masked score is -inf and is not counted as visible.
template <typename T>
struct SoftmaxRow {
  T maximum = -std::numeric_limits<T>::infinity();
  T sum = 0;
  T moment = 0;
  int32_t visible = 0;

  /// One more score.
  HEADWISE_HOST_DEVICE void add(T score) {
    if (score == -std::numeric_limits<T>::infinity()) return;
    *this = merge(*this, SoftmaxRow{score, T(1), T(0), 1});
  }

  /// Both sets of scores together: the running maximum of Milakov and Gimelshein (arXiv 1805.02867,
  /// algorithm 3), extended to the moment: shifting m by d turns it into e^d (moment + d sum).
  HEADWISE_HOST_DEVICE static SoftmaxRow merge(const SoftmaxRow& a, const SoftmaxRow& b) {
    if (b.visible == 0) return a;
    if (a.visible == 0) return b;
    const T m = a.maximum > b.maximum ? a.maximum : b.maximum;
    const T da = a.maximum - m, db = b.maximum - m;
    const T fa = std::exp(da), fb = std::exp(db);
    return {m, fa * a.sum + fb * b.sum, fa * (a.moment + da * a.sum) + fb * (b.moment + db * b.sum),
            a.visible + b.visible};
  }

  /// Entropy of the row over ln(number of keys it can see), in [0, 1]; 0 if it sees at most one.
  HEADWISE_HOST_DEVICE T normalized_entropy() const {
    if (visible < 2) return T(0);
    const T entropy = (std::log(sum) - moment / sum) / std::log(static_cast<T>(visible));
    // Rounding only; a NaN passes.
    return entropy < T(0) ? T(0) : (entropy > T(1) ? T(1) : entropy);
  }

  /// The largest probability; 0 for a row that sees nothing.
  HEADWISE_HOST_DEVICE T confidence() const { return visible == 0 ? T(0) : T(1) / sum; }
};

}  // namespace headwise::kernels

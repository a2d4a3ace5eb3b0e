// Shared by the bootstraps: draws that are the same on every platform, and percentiles.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace headwise::analysis {

/// Uniform draws of 0..size-1. The distributions of the standard library differ between platforms;
/// its generators do not.
class Draw {
 public:
  explicit Draw(int64_t seed) : generator_(static_cast<uint64_t>(seed)) {}
  int64_t operator()(int64_t size) {
    constexpr double kUnit = 1.0 / 9007199254740992.0;  // 2^-53
    const double uniform = static_cast<double>(generator_() >> 11) * kUnit;
    return static_cast<int64_t>(uniform * static_cast<double>(size));
  }

 private:
  std::mt19937_64 generator_;
};

/// More draws than this add nothing, and would take days.
constexpr int64_t kMostDraws = 10'000'000;

inline void check_draws(int64_t draws, const char* name) {
  TORCH_CHECK_VALUE(draws >= 1 && draws <= kMostDraws, name, " must be in 1..", kMostDraws,
                    ", got ", draws);
}

inline void check_resampling(int64_t resamples, double confidence_level) {
  check_draws(resamples, "resamples");
  TORCH_CHECK_VALUE(confidence_level > 0.0 && confidence_level < 1.0,
                    "confidence_level must be in (0, 1), got ", confidence_level);
}

/// The quantile at `share` of sorted values, linear between neighbours.
inline double quantile(const std::vector<double>& sorted, double share) {
  const double position = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace headwise::analysis

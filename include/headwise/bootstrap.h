// Bootstrap intervals: of paired differences, and of the agreement of head rankings.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>
#include <tuple>

#include "headwise/export.h"

namespace headwise {

/// Mean of paired differences with a percentile interval and a two-sided p-value, by resampling the
/// N examples with replacement (Koehn, EMNLP 2004; as Michel et al. 2019 test their ablations). All
/// M rows see the same resamples.
///
/// p is twice the smaller of (1 + #{mean* <= 0}) / (R + 1) and (1 + #{mean* >= 0}) / (R + 1), at
/// most 1 (Davison and Hinkley 1997, 4.2). The one-sided test of the papers is p / 2.
/// @param differences float64 [M, N]: of example n under comparison m
/// @param resamples R, at least 1
/// @param confidence_level of the interval, in (0, 1)
/// @returns mean, low, high, p: float64 [M] each
/// @throws c10::ValueError on N = 0, a value that is not finite, or an argument out of range
HEADWISE_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> paired_bootstrap(
    const at::Tensor& differences, int64_t resamples = 1000, int64_t seed = 0,
    double confidence_level = 0.95);

/// Rank correlation of every two of S score vectors over N heads, with percentile intervals by
/// resampling the heads.
/// @param scores float64 [S, N]
/// @param method "spearman" (Pearson of average ranks) or "kendall" (tau-b; Knight, JASA 1966)
/// @returns value, low, high: float64 [S, S] each, symmetric, with a diagonal of ones. Resamples in
///          which a vector is constant have no correlation and are left out.
/// @throws c10::ValueError on fewer than 2 heads, a value that is not finite, or a vector that is
///         constant
HEADWISE_API std::tuple<at::Tensor, at::Tensor, at::Tensor> rank_agreement(
    const at::Tensor& scores, std::string_view method = "spearman", int64_t resamples = 1000,
    int64_t seed = 0, double confidence_level = 0.95);

}  // namespace headwise

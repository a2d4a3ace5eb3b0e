// Statistics of heads: significance, agreement of rankings, and which heads can replace each other.
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
/// @param confidence of the interval, in (0, 1)
/// @returns mean, low, high, p: float64 [M] each
/// @throws c10::ValueError on N = 0, a value that is not finite, or an argument out of range
HEADWISE_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> paired_bootstrap(
    const at::Tensor& differences, int64_t resamples = 1000, int64_t seed = 0,
    double confidence = 0.95);

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
    int64_t seed = 0, double confidence = 0.95);

/// Linear centred kernel alignment of every two of T representations of the same n rows (Kornblith
/// et al. 2019, arXiv 1905.00414, eq. 3): |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns
/// centred. 1: equal up to rotation and scale; 0: unrelated. It is biased upwards unless n is much
/// larger than d.
/// @param outputs T tensors, float64 [n, d_t]
/// @returns float64 [T, T], symmetric, in [0, 1]; 0 for a representation that is constant (1 with
///          itself)
/// @throws c10::ValueError on no tensors, different n, n < 2, or a value that is not finite
HEADWISE_API at::Tensor linear_cka(at::TensorList outputs);

/// Second-order effect of two ablations on N examples, joint minus the sum of the single ones:
/// (both - full) - (first - full) - (second - full), its mean and the standard error of the mean.
/// Above 0: without one of the two the other matters more, so either can replace the other.
/// @param full float64 [N]: losses of the whole model
/// @param first, second, both float64 [P, N]: without one head, without the other, without either
/// @returns effect, standard_error: float64 [P] each; the error is 0 if N = 1
/// @throws c10::ValueError on N = 0 or different shapes
HEADWISE_API std::tuple<at::Tensor, at::Tensor> second_order_effect(const at::Tensor& full,
                                                                    const at::Tensor& first,
                                                                    const at::Tensor& second,
                                                                    const at::Tensor& both);

}  // namespace headwise

// How heads are used over a data set, with intervals and tests. Small problems on the host, in
// float64; torch.ops.headwise has these operators by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace headwise {

/// A share over clusters (the trials of one text are a cluster): sum of hits over sum of trials,
/// with a percentile interval from resampling the N clusters. NaN for a column without trials.
/// hits, trials [N, M] -> share, low, high: float64 [M] each
std::tuple<at::Tensor, at::Tensor, at::Tensor> share_interval(const at::Tensor& hits,
                                                              const at::Tensor& trials,
                                                              int64_t resamples = 1000,
                                                              int64_t seed = 0,
                                                              double confidence_level = 0.95);

/// Mutual information, in bits, between the choice of each head and the class of the input, and a
/// permutation test: p = (1 + #{shuffled >= observed}) / (1 + permutations). The plug-in estimate
/// is above 0 for independent data too; `by_chance` is its mean over the shuffles.
/// chosen bool [N, M], label int64 [N] in 0..classes-1
/// -> information, by_chance, p: float64 [M] each
std::tuple<at::Tensor, at::Tensor, at::Tensor> selection_information(const at::Tensor& chosen,
                                                                     const at::Tensor& label,
                                                                     int64_t classes,
                                                                     int64_t permutations = 1000,
                                                                     int64_t seed = 0);

/// Rank-biserial correlation (Cureton, Psychometrika 1956) between the choice of each head and a
/// number per input: P(value higher if chosen) - P(lower if chosen), ties halved, in [-1, 1]; 0 for
/// a head that is always or never chosen. The p-value is two-sided, by permutation of the inputs,
/// the same for all heads.
/// chosen bool [N, M], value [N] -> correlation, p: float64 [M] each
std::tuple<at::Tensor, at::Tensor> selection_association(const at::Tensor& chosen,
                                                         const at::Tensor& value,
                                                         int64_t permutations = 1000,
                                                         int64_t seed = 0);

/// p-values [M] adjusted for the false discovery rate (Benjamini and Hochberg, JRSS B 1995): the
/// smallest rate at which each would be called significant -> float64 [M]; NaN stays NaN and is
/// not counted.
at::Tensor false_discovery_rate(const at::Tensor& p);

/// Phi coefficient between the choices of every two heads, [M, M]: 0 if one of the two is always or
/// never chosen, 1 on the diagonal otherwise. chosen bool [N, M]
at::Tensor co_selection(const at::Tensor& chosen);

/// Jaccard overlap |A and B| / |A or B| of the heads chosen in two runs, 1 if neither chose any.
/// first, second bool [N, M] -> float64 [N]
at::Tensor selection_overlap(const at::Tensor& first, const at::Tensor& second);

/// Area between two curves over the same abscissae, other minus first, by the trapezoid rule and
/// divided by the range: the mean height of `other` above `first`. x [K] ascending, [K], [K] -> []
at::Tensor area_between(const at::Tensor& x, const at::Tensor& first, const at::Tensor& other);

}  // namespace headwise

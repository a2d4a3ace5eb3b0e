// Which heads are alike, and which can replace each other.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "headwise/export.h"

namespace headwise {

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

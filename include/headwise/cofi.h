// Structured pruning by masks of five grains: Xia et al. 2022, "Structured Pruning Learns Compact
// and Accurate Models" (CoFi, arXiv 2204.00408). torch.ops.headwise has these by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "headwise/export.h"

namespace headwise {

/// The expected number of remaining weights (section 3.1), differentiable -> []: sum(hidden) (4
/// sum_l attention_l head_dim_l sum(heads_l) + 2 sum_l ffn_l sum(neurons_l)). Every argument holds
/// probabilities that a mask is open; with masks of 1 and 0 it is the size.
/// @param heads     [H_l], one per attention layer
/// @param attention [layers]
/// @param neurons   [F_l], one per feed-forward network
/// @param ffn       [networks]
/// @param hidden    [D]
/// @param head_dims width of a head, one per attention layer
HEADWISE_API at::Tensor structure_size(at::TensorList heads, const at::Tensor& attention,
                                       at::TensorList neurons, const at::Tensor& ffn,
                                       const at::Tensor& hidden, at::IntArrayRef head_dims);

/// m_0 d + m_1 d^2 with d = 1 - size / full_size - t, where t grows linearly from 0 at progress 0
/// to `target` at progress `warmup` -> []. An optimiser that descends on the loss ascends in the
/// multipliers [2]: their gradient has the opposite sign.
HEADWISE_API at::Tensor sparsity_penalty(const at::Tensor& size, double full_size,
                                         const at::Tensor& progress, double target, double warmup,
                                         const at::Tensor& multipliers);

/// The masks of evaluation, row by row: of the N units in a row, the round(N - sum P(open)) with
/// the lowest logits get 0 (ties keep the lower unit) and the others sigmoid(0.8 log_alpha / beta),
/// as in the authors' code. A row of one unit is open if P(open) >= 1/2.
/// @param log_alpha [..., N]
/// @param shift added to the logits to count the units that stay; their values do not change
HEADWISE_API at::Tensor hard_concrete_keep(const at::Tensor& log_alpha, double beta, double gamma,
                                           double zeta, double shift = 0.0);

/// The student's layer for each teacher's layer: the nearest remaining one, in order (a teacher's
/// lower layer never gets a higher one), from the last layer down. -1 if no layer remains.
/// @param distances [T, S] of the teacher's layers to the student's
/// @param alive     bool [S]
/// @return int64 [T]
HEADWISE_API at::Tensor match_layers(const at::Tensor& distances, const at::Tensor& alive);

/// T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over rows (Hinton et al. 2015).
/// @param student, teacher [B, C], logits
HEADWISE_API at::Tensor distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                                          double temperature);

}  // namespace headwise

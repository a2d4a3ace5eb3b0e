// Operators of the hard-concrete gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace headwise {

/// Gate values in [0, 1] of log_alpha, any shape. With `uniform` numbers in [0, 1] a sample:
/// s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta); without, s = sigmoid(log_alpha). Then
/// clip(s (zeta - gamma) + gamma, 0, 1).
at::Tensor hard_concrete(const at::Tensor& log_alpha, const std::optional<at::Tensor>& uniform,
                         double beta, double gamma, double zeta);

/// P(gate > 0) = sigmoid(log_alpha - beta ln(-gamma / zeta)).
at::Tensor hard_concrete_open(const at::Tensor& log_alpha, double beta, double gamma, double zeta);

/// {index, count, weight, expected_heads} from log_alpha [B, H]. Training samples until `progress`
/// reaches hard_from, then takes evaluation's values; with
/// weight_one a head is open, with weight 1, where P(open) > 1/2, and the gradient is P(open)'s. A
/// head whose gate is 0 does not run.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hard_concrete_select(
    const at::Tensor& log_alpha, const std::optional<at::Tensor>& uniform,
    const at::Tensor& progress, bool training, bool run_all, double hard_from, double beta,
    double gamma, double zeta, bool weight_one);

/// m_0 off + m_1 off^2 for multipliers m [2], which descent on the loss ascends.
at::Tensor lagrangian(const at::Tensor& off, const at::Tensor& multipliers);

/// How far the heads that layers expect to run (one [B] per layer; mean over the batch, pooled over
/// layers, as a fraction of num_heads) lie from the scheduled target -> []. form: 'squared',
/// 'lagrangian' (multipliers [2], which descent on the loss ascends) or 'l0' (strength times the
/// mean over layers of the expected heads).
at::Tensor target_penalty(at::TensorList expected_heads, at::IntArrayRef num_heads,
                          const at::Tensor& progress, double keep, double initial_keep,
                          double warmup, double strength, std::string_view form,
                          const std::optional<at::Tensor>& multipliers);

}  // namespace headwise

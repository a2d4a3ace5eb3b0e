// Operators of the subset gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace headwise {

/// A relaxed choice of k of N heads: the sum of k softmax distributions, each without what the
/// previous ones took -> float64 [N], summing to k. scores [N] (noise included), temperature [].
at::Tensor subset_sample(const at::Tensor& scores, int64_t k, const at::Tensor& temperature);

/// The weight of every head of a model, float64 [N]: in evaluation 1 for the k of largest score
/// (ties: the lower head) and 0 for the others. In training without noise, or from `progress` =
/// hard_from on, the same with the identity as its gradient; else subset_sample of scores + noise,
/// ln temperature falling linearly until `progress` = cooled_at.
at::Tensor subset_weight(const at::Tensor& scores, const std::optional<at::Tensor>& noise,
                         const at::Tensor& progress, int64_t k, bool training, double temperature,
                         double final_temperature, double cooled_at, double hard_from);

}  // namespace headwise

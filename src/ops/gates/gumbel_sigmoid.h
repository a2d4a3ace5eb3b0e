// Operators of the Gumbel-sigmoid gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace headwise {

/// {index, count, weight, expected_heads} from logits [B, H]: a head runs, with weight 1, where
/// sigmoid(logit) > 1/2. In training with `uniform` numbers in [0, 1], until `progress` =
/// hard_from, where sigmoid((logit + g1 - g2) / temperature) > 1/2, g1 - g2 the difference of two
/// Gumbel variables; the gradient is that of the sigmoid.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gumbel_sigmoid_select(
    const at::Tensor& logits, const std::optional<at::Tensor>& uniform, const at::Tensor& progress,
    bool training, bool run_all, double hard_from, double temperature);

/// What AdaViT's released losses add to the usage loss: 0.1 strength (d - e) -> []; d the mean over
/// heads of |mean of weight [B, H] over the batch - target share|, e the mean entropy, in nats, of
/// sigmoid(logits [B, H]). The target share is scheduled_target(progress, ...).
at::Tensor gumbel_sigmoid_regulariser(const at::Tensor& logits, const at::Tensor& weight,
                                      const at::Tensor& progress, double keep, double initial_keep,
                                      double warmup, double strength);

}  // namespace headwise

// Attention over every head, in plain ATen calls: for layers without a gate, for recorders, and for
// requested attention probabilities. Differentiable, any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "headwise/attention.h"
#include "headwise/export.h"

namespace headwise {

/// query [B, L, D], key [B, S, Dk], value [B, S, Dv] -> q [B, H, L, d], k [B, H, S', d],
/// v [B, H, S', d], where S' = S + one for bias_k/bias_v + one for add_zero_attn.
HEADWISE_API std::tuple<at::Tensor, at::Tensor, at::Tensor> project_heads(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const ProjectionWeights& weights, int64_t num_heads);

/// Scaled dot-product attention of every head. Masks cover the first S' - added_keys keys; the
/// added ones are always visible.
/// @return [B, H, L, d]
HEADWISE_API at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k,
                                        const at::Tensor& v,
                                        const AttentionArguments& arguments = {},
                                        int64_t added_keys = 0);

/// The probabilities of every head, before dropout.
/// @return [B, H, L, S']
HEADWISE_API at::Tensor attention_probabilities(const at::Tensor& q, const at::Tensor& k,
                                                const AttentionArguments& arguments = {},
                                                int64_t added_keys = 0);

/// The heads' outputs times their weights, joined and projected: context [B, H, L, d],
/// weight [B, H] or none -> [B, L, D].
HEADWISE_API at::Tensor combine_heads(const at::Tensor& context,
                                      const std::optional<at::Tensor>& weight,
                                      const at::Tensor& out_proj_weight,
                                      const std::optional<at::Tensor>& out_proj_bias);

}  // namespace headwise

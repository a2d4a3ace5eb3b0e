// Operators of the threshold gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace headwise {

/// {blocks, visible, head} of q [B, H, L, d] and k [B, H, S, d]: with I the integer part (towards
/// zero) of `resolution` times a tensor, blocks [B, H, ceil(L / block), ceil(S / block)] is the sum
/// of |I_q I_k^T| over each block of scores, visible how many scores of the block a query may see,
/// and head [B, H] the sum over blocks, divided by the number of visible scores with `normalize`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> integer_importance(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& query_padding_mask, const std::optional<at::Tensor>& attn_mask,
    bool is_causal, double resolution, int64_t block, bool normalize, int64_t added_keys);

/// Which blocks stay, bool, of blocks and visible [B, H, R, C]: those not under their row's
/// threshold, ratio * max + (1 - ratio) * mean for ratio >= 0 and -ratio * min + (1 + ratio) * mean
/// below 0, over the row's visible blocks. A row's largest visible block always stays.
at::Tensor kept_blocks(const at::Tensor& blocks, const at::Tensor& visible, double ratio);

/// q k^T of three of its four integer and fraction products: all but F_q F_k^T [B, H, L, S].
at::Tensor three_product_scores(const at::Tensor& q, const at::Tensor& k, double resolution);

/// softmax(scores / sqrt(d)) v over the kept blocks [B, H, L, dv]; approximate: with
/// three_product_scores. Without block_ratio every block stays.
at::Tensor hybrid_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& key_padding_mask,
                            const std::optional<at::Tensor>& query_padding_mask,
                            const std::optional<at::Tensor>& attn_mask, bool is_causal,
                            double resolution, int64_t block, std::optional<double> block_ratio,
                            bool approximate, int64_t added_keys);

/// {index, count}: the heads whose importance [B, H] is above `threshold` [], and the most
/// important ones up to min_heads.
std::tuple<at::Tensor, at::Tensor> select_above(const at::Tensor& importance,
                                                const at::Tensor& threshold, int64_t min_heads);

}  // namespace headwise

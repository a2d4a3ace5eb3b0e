// Masks of attention in one form.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace headwise {

/// Every mask in one additive mask broadcastable to [B, H, L, S'], or none. added_keys: how many of
/// the last keys the masks do not cover.
std::optional<at::Tensor> merge_masks(const at::Tensor& q, const at::Tensor& k,
                                      const std::optional<at::Tensor>& key_padding_mask,
                                      const std::optional<at::Tensor>& attn_mask, bool is_causal,
                                      int64_t added_keys);

}  // namespace headwise

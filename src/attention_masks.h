// Masks of attention in one form.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace headwise {

/// @throws c10::TypeError if `mask` is defined and neither boolean nor floating
inline void check_mask(const char* name, const at::Tensor& mask) {
  TORCH_CHECK_TYPE(!mask.defined() || mask.scalar_type() == at::kBool || mask.is_floating_point(),
                   name, " must be boolean or floating, got ", mask.scalar_type());
}

/// Every mask in one additive mask broadcastable to [B, H, L, S'], or none. added_keys: how many of
/// the last keys the masks do not cover.
std::optional<at::Tensor> merge_masks(const at::Tensor& q, const at::Tensor& k,
                                      const std::optional<at::Tensor>& key_padding_mask,
                                      const std::optional<at::Tensor>& attn_mask, bool is_causal,
                                      int64_t added_keys);

}  // namespace headwise

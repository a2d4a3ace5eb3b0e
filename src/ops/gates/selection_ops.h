// Composites that gates share; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace headwise {

/// Mean of x [B, L, D] over the rows that are not padding -> [B, D].
at::Tensor masked_mean(const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask);

/// budget [B] in (0, 1] -> int32 [B]: round (half up) or ceil of budget * num_heads, held in
/// [min(min_heads, num_heads), num_heads].
at::Tensor budget_count(const at::Tensor& budget, int64_t num_heads, int64_t min_heads,
                        std::string_view rounding);

/// weight [B, H] -> index int32 [B, H], count int32 [B] of the heads whose weight is not 0.
std::tuple<at::Tensor, at::Tensor> select_nonzero(const at::Tensor& weight);

}  // namespace headwise

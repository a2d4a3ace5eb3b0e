// The oracle: compute every head, multiply each by its weight (0 where not chosen), project.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <optional>

#include "headwise/selection.h"

namespace oracle {

/// weight [B, H] where the head was chosen, 0 elsewhere.
inline at::Tensor dense_weight(const headwise::Selection& selection) {
  auto chosen = at::zeros_like(selection.weight);
  for (int64_t b = 0; b < selection.index.size(0); ++b)
    for (int64_t n = 0; n < selection.count[b].item<int64_t>(); ++n)
      chosen[b][selection.index[b][n].item<int64_t>()] = 1;
  return selection.weight * chosen;
}

/// A mask as torch.nn.MultiheadAttention reads it, in the form that is added to scores.
inline at::Tensor additive(const at::Tensor& mask, at::ScalarType type) {
  if (mask.scalar_type() != at::kBool) return mask.to(type);
  return at::zeros(mask.sizes(), mask.options().dtype(type))
      .masked_fill(mask, -std::numeric_limits<double>::infinity());
}

/// softmax(q k' / sqrt(d) + masks) v of every head; rows that see no key give zeros.
/// q [B, H, L, d], k [B, H, S, d], v [B, H, S, dv] -> [B, H, L, dv]
inline at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& key_padding_mask = {},
                            bool is_causal = false) {
  auto scores = q.matmul(k.transpose(2, 3)) / std::sqrt(double(q.size(3)));  // [B, H, L, S]
  if (key_padding_mask)
    scores = scores + additive(*key_padding_mask, q.scalar_type()).unsqueeze(1).unsqueeze(1);
  if (is_causal) {
    auto hidden = at::ones({q.size(2), k.size(2)}, q.options().dtype(at::kBool)).triu(1);
    scores = scores + additive(hidden, q.scalar_type());
  }
  auto sees = scores.gt(-std::numeric_limits<double>::infinity()).any(-1, true);
  return at::where(sees, scores, at::zeros_like(scores)).softmax(-1).mul(sees).matmul(v);
}

/// x [B, L, D] -> [B, L, D]
inline at::Tensor self_attention(const at::Tensor& x, const at::Tensor& in_proj_weight,
                                 const at::Tensor& in_proj_bias, const at::Tensor& out_proj_weight,
                                 const at::Tensor& out_proj_bias, int64_t num_heads,
                                 const headwise::Selection& selection,
                                 const std::optional<at::Tensor>& key_padding_mask = {},
                                 bool is_causal = false) {
  auto heads =
      at::linear(x, in_proj_weight, in_proj_bias)
          .view({x.size(0), x.size(1), 3, num_heads, in_proj_weight.size(0) / 3 / num_heads})
          .permute({2, 0, 3, 1, 4});  // [3, B, H, L, d]
  auto context = attention(heads[0], heads[1], heads[2], key_padding_mask, is_causal);
  context = context * dense_weight(selection).to(x.scalar_type()).unsqueeze(-1).unsqueeze(-1);
  return at::linear(context.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias);
}

/// `heads` random heads of every sequence, weights between 0.5 and 1.5.
inline headwise::Selection random_selection(int64_t batch, int64_t num_heads, int64_t heads,
                                            at::TensorOptions options) {
  auto chosen = std::get<0>(
      at::rand({batch, num_heads}).argsort(int64_t{1}, false).slice(1, 0, heads).sort(1));
  auto index = at::full({batch, num_heads}, -1, at::kLong);
  index.slice(1, 0, heads).copy_(chosen);
  auto mask = at::zeros({batch, num_heads}).scatter_(1, chosen, 1.0);
  return {index.to(at::kInt),
          at::full({batch}, heads, at::kInt),
          (mask * (at::rand({batch, num_heads}) + 0.5)).to(options),
          {},
          {}};
}

}  // namespace oracle

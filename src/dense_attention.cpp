#include "headwise/dense_attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "attention_masks.h"

namespace headwise {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Sizes are read as SymInt throughout: these composites are traced by torch.compile and
// torch.export with dynamic batch and length.

// [B, S, H * d] -> [B, H, S, d]
at::Tensor split_heads(const at::Tensor& x, int64_t num_heads) {
  const c10::SymInt width = num_heads == 0 ? c10::SymInt(1) : x.sym_size(2) / num_heads;
  return x.view_symint({x.sym_size(0), x.sym_size(1), num_heads, width}).transpose(1, 2);
}

at::Tensor append_key(const at::Tensor& projected, const at::Tensor& row) {
  const auto one = row.reshape({1, 1, -1}).to(projected.scalar_type());
  return at::cat({projected, one.expand_symint({projected.sym_size(0), 1, projected.sym_size(2)})},
                 1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> project_heads_impl(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& q_weight, const at::Tensor& k_weight, const at::Tensor& v_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_bias, const OptionalTensor& v_bias,
    int64_t num_heads, const OptionalTensor& bias_k, const OptionalTensor& bias_v,
    bool add_zero_attn) {
  TORCH_CHECK_VALUE(num_heads >= 0, "num_heads must not be negative, got ", num_heads);
  auto q = at::linear(query, q_weight, q_bias);  // [B, L, E]
  auto k = at::linear(key, k_weight, k_bias);    // [B, S, E]
  auto v = at::linear(value, v_weight, v_bias);  // [B, S, E]
  TORCH_CHECK_VALUE(bias_k.has_value() == bias_v.has_value(),
                    "bias_k and bias_v must be given together");
  if (bias_k) {
    k = append_key(k, *bias_k);
    v = append_key(v, *bias_v);
  }
  if (add_zero_attn) {
    k = at::constant_pad_nd(k, {0, 0, 0, 1});
    v = at::constant_pad_nd(v, {0, 0, 0, 1});
  }
  return {split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)};
}

// A boolean mask (True = may not attend) or a floating one, as a floating mask.
at::Tensor additive(const at::Tensor& mask, at::ScalarType dtype) {
  if (mask.scalar_type() != at::kBool) {
    return mask.to(dtype);
  }
  return at::zeros_like(mask, mask.options().dtype(dtype))
      .masked_fill(mask, -std::numeric_limits<double>::infinity());
}

}  // namespace

OptionalTensor merge_masks(const at::Tensor& q, const at::Tensor& k,
                           const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask,
                           bool is_causal, int64_t added_keys) {
  TORCH_CHECK_VALUE(added_keys >= 0 && added_keys <= k.sym_size(2), "added_keys must be in 0..",
                    k.sym_size(2), ", got ", added_keys);
  OptionalTensor merged;
  const auto join = [&](const at::Tensor& mask) { merged = merged ? *merged + mask : mask; };
  if (key_padding_mask) {
    join(additive(*key_padding_mask, q.scalar_type()).unsqueeze(1).unsqueeze(1));  // [B, 1, 1, S]
  }
  if (attn_mask) {
    join(additive(*attn_mask, q.scalar_type()));
  }
  if (is_causal) {
    const auto future =
        at::ones_symint({q.sym_size(2), k.sym_size(2) - added_keys}, q.options().dtype(at::kBool))
            .triu(1);
    join(additive(future, q.scalar_type()));
  }
  if (merged && added_keys > 0) {
    merged = at::constant_pad_nd(*merged, {0, added_keys});
  }
  return merged;
}

namespace {

at::Tensor dense_attention_impl(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const OptionalTensor& key_padding_mask,
                                const OptionalTensor& attn_mask, bool is_causal, double dropout_p,
                                std::optional<double> scale, int64_t added_keys) {
  if (q.sym_size(1) == 0) {
    return at::zeros_symint({q.sym_size(0), 0, q.sym_size(2), v.sym_size(3)}, q.options());
  }
  // Without any other mask the causal flag is passed on: the fused kernels then skip future keys.
  const bool only_causal = is_causal && !key_padding_mask && !attn_mask && added_keys == 0;
  const auto mask =
      merge_masks(q, k, key_padding_mask, attn_mask, is_causal && !only_causal, added_keys);
  return at::scaled_dot_product_attention(q, k, v, mask, dropout_p, only_causal, scale);
}

at::Tensor attention_probabilities_impl(const at::Tensor& q, const at::Tensor& k,
                                        const OptionalTensor& key_padding_mask,
                                        const OptionalTensor& attn_mask, bool is_causal,
                                        std::optional<double> scale, int64_t added_keys) {
  const int64_t width = q.sym_size(3).guard_int(__FILE__, __LINE__);
  const double factor =
      scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(width, 1))));
  auto scores = at::matmul(q * factor, k.transpose(2, 3));  // [B, H, L, S']
  const auto mask = merge_masks(q, k, key_padding_mask, attn_mask, is_causal, added_keys);
  if (!mask) {
    return at::softmax(scores, -1);
  }
  scores = scores + *mask;
  // A row that may see no key at all has no distribution: zeros, as the fused kernels give.
  const auto blind = scores.eq(-std::numeric_limits<double>::infinity()).all(-1, true);
  return at::softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0);
}

at::Tensor combine_heads_impl(const at::Tensor& context, const OptionalTensor& weight,
                              const at::Tensor& out_proj_weight,
                              const OptionalTensor& out_proj_bias) {
  auto weighted = context;
  if (weight) {
    weighted = context * weight->to(context.scalar_type()).unsqueeze(-1).unsqueeze(-1);
  }
  const auto joined = weighted.transpose(1, 2).reshape_symint(
      {context.sym_size(0), context.sym_size(2), out_proj_weight.sym_size(1)});
  return at::linear(joined, out_proj_weight, out_proj_bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("project_heads", project_heads_impl);
  m.impl("dense_attention", dense_attention_impl);
  m.impl("attention_probabilities", attention_probabilities_impl);
  m.impl("combine_heads", combine_heads_impl);
}

// The C++ functions call the implementations: a composite has no kernel to dispatch to, and the
// ATen calls inside dispatch by themselves.
std::tuple<at::Tensor, at::Tensor, at::Tensor> project_heads(const at::Tensor& query,
                                                             const at::Tensor& key,
                                                             const at::Tensor& value,
                                                             const ProjectionWeights& weights,
                                                             int64_t num_heads) {
  return project_heads_impl(query, key, value, weights.q_weight, weights.k_weight, weights.v_weight,
                            weights.q_bias, weights.k_bias, weights.v_bias, num_heads,
                            weights.bias_k, weights.bias_v, weights.add_zero_attn);
}

at::Tensor dense_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const AttentionArguments& arguments, int64_t added_keys) {
  return dense_attention_impl(q, k, v, arguments.key_padding_mask, arguments.attn_mask,
                              arguments.is_causal, arguments.dropout_p, arguments.scale,
                              added_keys);
}

at::Tensor attention_probabilities(const at::Tensor& q, const at::Tensor& k,
                                   const AttentionArguments& arguments, int64_t added_keys) {
  return attention_probabilities_impl(q, k, arguments.key_padding_mask, arguments.attn_mask,
                                      arguments.is_causal, arguments.scale, added_keys);
}

at::Tensor combine_heads(const at::Tensor& context, const OptionalTensor& weight,
                         const at::Tensor& out_proj_weight, const OptionalTensor& out_proj_bias) {
  return combine_heads_impl(context, weight, out_proj_weight, out_proj_bias);
}

}  // namespace headwise

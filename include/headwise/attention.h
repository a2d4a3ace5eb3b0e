// The operators that run the chosen heads and no others, as C++ functions. Each goes through the
// dispatcher (torch.ops.headwise.*), so C++ and Python share kernels and autograd rules.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "headwise/export.h"

namespace headwise {

/// What an attention operator takes besides its tensors. Masks follow torch.nn.MultiheadAttention:
/// boolean True means 'may not attend', a floating mask is added to the scores.
struct AttentionArguments {
  std::optional<at::Tensor> key_padding_mask;  ///< bool or floating [B, S]
  std::optional<at::Tensor> attn_mask;         ///< bool or floating, broadcastable to [B, H, L, S]
  bool is_causal = false;                      ///< query i sees keys 0..i
  double dropout_p = 0.0;                      ///< on the attention probabilities
  std::optional<at::Tensor> dropout_seed;      ///< int64 [1]; required when dropout_p > 0
  std::optional<double> scale;                 ///< of the scores; default 1/sqrt(d)
};

/// x [B, L, D] -> [B, L, D]: Q, K, V, attention and output projection of the chosen heads only.
/// in_proj_weight [3E, D], in_proj_bias [3E], out_proj_weight [D, E], out_proj_bias [D], E = H d.
HEADWISE_API at::Tensor selected_self_attention(
    const at::Tensor& x, const at::Tensor& in_proj_weight,
    const std::optional<at::Tensor>& in_proj_bias, const at::Tensor& out_proj_weight,
    const std::optional<at::Tensor>& out_proj_bias, int64_t num_heads, const at::Tensor& index,
    const at::Tensor& count, const at::Tensor& weight, const AttentionArguments& arguments = {});

/// The weights of the general query/key/value form.
struct ProjectionWeights {
  at::Tensor q_weight, k_weight, v_weight;           ///< [E, D], [E, Dk], [E, Dv]
  std::optional<at::Tensor> q_bias, k_bias, v_bias;  ///< [E]
  at::Tensor out_proj_weight;                        ///< [D, E]
  std::optional<at::Tensor> out_proj_bias;           ///< [D]
  std::optional<at::Tensor> bias_k, bias_v;          ///< [E]: one more key/value row
  bool add_zero_attn = false;                        ///< one more key/value row of zeros
};

/// query [B, L, D], key [B, S, Dk], value [B, S, Dv] -> [B, L, D].
HEADWISE_API at::Tensor selected_multihead_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const ProjectionWeights& weights, int64_t num_heads, const at::Tensor& index,
    const at::Tensor& count, const at::Tensor& weight, const AttentionArguments& arguments = {});

/// q [B, H, L, d], k [B, Hkv, S, d], v [B, Hkv, S, dv] (Hkv divides H) -> [B, H, L, dv]; zeros for
/// heads that were not chosen. `weight` [B, H], where given, multiplies each head's output.
HEADWISE_API at::Tensor selected_attention(const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const at::Tensor& index,
                                           const at::Tensor& count,
                                           const std::optional<at::Tensor>& weight = {},
                                           const AttentionArguments& arguments = {});

/// {entropy, confidence}, each [B, H]: the mean over query rows of the row's entropy divided by the
/// log of the number of keys it can see (in [0, 1]; a row with one key counts 0), and of the row's
/// largest probability. Padded queries are left out. Never materialises L x S.
HEADWISE_API std::tuple<at::Tensor, at::Tensor> attention_statistics(
    const at::Tensor& q, const at::Tensor& k,
    const std::optional<at::Tensor>& key_padding_mask = {},
    const std::optional<at::Tensor>& query_padding_mask = {},
    const std::optional<at::Tensor>& attn_mask = {}, bool is_causal = false,
    std::optional<double> scale = {});

/// The entropy alone.
HEADWISE_API at::Tensor attention_entropy(const at::Tensor& q, const at::Tensor& k,
                                          const std::optional<at::Tensor>& key_padding_mask = {},
                                          const std::optional<at::Tensor>& query_padding_mask = {},
                                          const std::optional<at::Tensor>& attn_mask = {},
                                          bool is_causal = false, std::optional<double> scale = {});

}  // namespace headwise

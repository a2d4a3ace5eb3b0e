// The operators that run the chosen heads and no others, as C++ functions. Each goes through the
// dispatcher (torch.ops.headwise.*), so C++ and Python share kernels and autograd rules.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "headwise/export.h"

namespace headwise {

/// Arguments of an attention operator besides its tensors. Masks follow
/// torch.nn.MultiheadAttention: boolean True means 'may not attend', a floating mask is added to
/// the scores.
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

/// selected_multihead_attention with heads chosen by every token. Queries, attention and output
/// projection of each head are computed for the tokens that chose it, its keys and values for the
/// sequences in which one did, forward and backward, on a CPU. On other devices, and in bfloat16
/// where a gradient is wanted, every head is computed for every token, and masked.
/// @param chosen bool [B, L, H]
/// @param weight floating [B, L, H], multiplies the outputs of the chosen heads
HEADWISE_API at::Tensor routed_multihead_attention(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value,
                                                   const ProjectionWeights& weights,
                                                   int64_t num_heads, const at::Tensor& chosen,
                                                   const at::Tensor& weight,
                                                   const AttentionArguments& arguments = {});

/// Queries, keys or values of the chosen heads, for models that rotate, normalise or cache them
/// before selected_attention: x [B, L, D] -> [B, H, L, d], exact zeros for heads that were not
/// chosen. For keys and values that query heads share, pass the selection of select_groups() and
/// their number of heads. Reads the chosen heads' rows of the weight and no others: O(L D d) for a
/// chosen head, forward and backward. All other gradients of the weight are zeros.
/// @param x       [B, L, D] float64, float32, bfloat16 or float16
/// @param weight  [H d, D], rows of head 0 first, as torch.nn.Linear's
/// @param bias    [H d] or none
/// @param index, count  int32 or int64 [B, K] and [B]; K <= H = num_heads
/// @throws c10::ValueError for a wrong shape, or an invalid selection (CPU; a CUDA device leaves
/// out heads that do not exist); c10::IndexError (CPU) for a head out of range; c10::TypeError for
/// another dtype.
HEADWISE_API at::Tensor selected_projection(const at::Tensor& x, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias,
                                            int64_t num_heads, const at::Tensor& index,
                                            const at::Tensor& count);

/// The output projection over the chosen heads: bias + sum over them of head_weight[b, h] *
/// heads[b, h] weight[:, h d .. h d + d]'. Heads that were not chosen are not read and get zero
/// gradients; nor are their columns of the weight. O(L Dout d) for a chosen head. A sequence
/// without heads gives the bias.
/// @param heads   [B, H, L, d] by any strides, as selected_attention returns it
/// @param weight  [Dout, H d], as torch.nn.Linear's
/// @param bias    [Dout] or none
/// @param index, count  int32 or int64 [B, K] and [B]; K <= H
/// @param head_weight   floating [B, H] or none: 1
/// @return [B, L, Dout]
/// @throws as selected_projection
HEADWISE_API at::Tensor selected_output_projection(
    const at::Tensor& heads, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& index, const at::Tensor& count,
    const std::optional<at::Tensor>& head_weight = {});

/// q [B, H, L, d], k [B, Hkv, S, d], v [B, Hkv, S, dv] (Hkv divides H) -> [B, H, L, dv]; zeros for
/// heads that were not chosen. `weight` [B, H], if given, multiplies each head's output.
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

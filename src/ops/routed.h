// routed_multihead_attention in C++, as in attention_ops.h: heads chosen by every token.
#pragma once

#include "ops/attention_ops.h"

namespace headwise::ops {

#define HEADWISE_ROUTED_PARAMETERS                                                               \
  const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,                       \
      const at::Tensor &q_weight, const at::Tensor &k_weight, const at::Tensor &v_weight,        \
      const OptionalTensor &q_bias, const OptionalTensor &k_bias, const OptionalTensor &v_bias,  \
      const at::Tensor &out_proj_weight, const OptionalTensor &out_proj_bias, int64_t num_heads, \
      const at::Tensor &chosen, const at::Tensor &weight, const OptionalTensor &bias_k,          \
      const OptionalTensor &bias_v, bool add_zero_attn, HEADWISE_MASK_PARAMETERS
#define HEADWISE_ROUTED_INPUTS                                                                  \
  ::headwise::ops::RoutedInputs {                                                               \
    query, key, value, {q_weight,        k_weight,      v_weight, q_bias, k_bias,       v_bias, \
                        out_proj_weight, out_proj_bias, bias_k,   bias_v, add_zero_attn},       \
        num_heads, chosen, weight, {                                                            \
      HEADWISE_MASK_ARGUMENTS                                                                   \
    }                                                                                           \
  }

/// Inputs of routed_multihead_attention.
struct RoutedInputs {
  at::Tensor query, key, value;
  ProjectionWeights weights;
  int64_t num_heads;
  at::Tensor chosen, weight;  // [B, L, H]
  AttentionArguments arguments;
};

// Calls through the dispatcher.
at::Tensor call(const RoutedInputs& in);
LayerForward call_forward(const RoutedInputs& in);
MultiheadBackward call_backward(const at::Tensor& grad_output, const RoutedInputs& in,
                                const LayerSaved& saved, const Needs<15>& needs);

// Shapes, dtypes and devices (src/ops/attention_checks.cpp).
void check_inputs(const RoutedInputs& in);
void check_backward(const at::Tensor& grad_output, const RoutedInputs& in, const LayerSaved& saved);

}  // namespace headwise::ops

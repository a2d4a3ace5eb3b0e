// routed_multihead_attention in C++, as in attention_ops.h: heads chosen by every token.
#pragma once

#include "ops/attention_ops.h"

namespace headwise::ops {

#define HEADWISE_ROUTED_PARAMETERS                                                 \
  HEADWISE_GENERAL_PARAMETERS, const at::Tensor &chosen, const at::Tensor &weight, \
      HEADWISE_ADDED_PARAMETERS
#define HEADWISE_ROUTED_INPUTS                                                                  \
  ::headwise::ops::RoutedInputs {                                                               \
    query, key, value, HEADWISE_WEIGHTS, num_heads, chosen, weight, { HEADWISE_MASK_ARGUMENTS } \
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

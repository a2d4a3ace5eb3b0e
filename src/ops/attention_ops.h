// The attention operators in C++: their inputs as structs, calls through the dispatcher, and the
// checks that all backends share. The schemas are in src/ops/schemas.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "headwise/attention.h"

namespace headwise::ops {

using OptionalTensor = std::optional<at::Tensor>;

// The parameter lists of the schemas. Every key (CPU, CUDA, Meta, Autograd, Autocast) registers
// functions of these lists; written once, they cannot drift apart.
#define HEADWISE_MASK_PARAMETERS                                                           \
  const OptionalTensor &key_padding_mask, const OptionalTensor &attn_mask, bool is_causal, \
      double dropout_p, const OptionalTensor &dropout_seed, std::optional<double> scale
#define HEADWISE_MASK_ARGUMENTS \
  key_padding_mask, attn_mask, is_causal, dropout_p, dropout_seed, scale

#define HEADWISE_SELF_PARAMETERS                                                                 \
  const at::Tensor &x, const at::Tensor &in_proj_weight, const OptionalTensor &in_proj_bias,     \
      const at::Tensor &out_proj_weight, const OptionalTensor &out_proj_bias, int64_t num_heads, \
      const at::Tensor &index, const at::Tensor &count, const at::Tensor &weight,                \
      HEADWISE_MASK_PARAMETERS
#define HEADWISE_SELF_INPUTS                                                                  \
  ::headwise::ops::SelfInputs {                                                               \
    x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads, index, count, \
        weight, {                                                                             \
      HEADWISE_MASK_ARGUMENTS                                                                 \
    }                                                                                         \
  }

// The general form; what chooses the heads comes between its two halves.
#define HEADWISE_GENERAL_PARAMETERS                                                             \
  const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,                      \
      const at::Tensor &q_weight, const at::Tensor &k_weight, const at::Tensor &v_weight,       \
      const OptionalTensor &q_bias, const OptionalTensor &k_bias, const OptionalTensor &v_bias, \
      const at::Tensor &out_proj_weight, const OptionalTensor &out_proj_bias, int64_t num_heads
#define HEADWISE_ADDED_PARAMETERS                                                 \
  const OptionalTensor &bias_k, const OptionalTensor &bias_v, bool add_zero_attn, \
      HEADWISE_MASK_PARAMETERS
#define HEADWISE_WEIGHTS                                                                          \
  ::headwise::ProjectionWeights {                                                                 \
    q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, out_proj_weight, out_proj_bias, bias_k, \
        bias_v, add_zero_attn                                                                     \
  }

#define HEADWISE_MULTIHEAD_PARAMETERS                                            \
  HEADWISE_GENERAL_PARAMETERS, const at::Tensor &index, const at::Tensor &count, \
      const at::Tensor &weight, HEADWISE_ADDED_PARAMETERS
#define HEADWISE_MULTIHEAD_INPUTS                                           \
  ::headwise::ops::MultiheadInputs {                                        \
    query, key, value, HEADWISE_WEIGHTS, num_heads, index, count, weight, { \
      HEADWISE_MASK_ARGUMENTS                                               \
    }                                                                       \
  }

#define HEADWISE_CORE_PARAMETERS                                                          \
  const at::Tensor &q, const at::Tensor &k, const at::Tensor &v, const at::Tensor &index, \
      const at::Tensor &count, const OptionalTensor &weight, HEADWISE_MASK_PARAMETERS
#define HEADWISE_CORE_INPUTS                                   \
  ::headwise::ops::CoreInputs {                                \
    q, k, v, index, count, weight, { HEADWISE_MASK_ARGUMENTS } \
  }

// The functions that a backend registers, by name.
#define HEADWISE_REGISTER_LAYER(m)                                    \
  m.impl("selected_self_attention", self);                            \
  m.impl("_selected_self_attention_forward", self_forward);           \
  m.impl("_selected_self_attention_backward", self_backward);         \
  m.impl("selected_multihead_attention", multihead);                  \
  m.impl("_selected_multihead_attention_forward", multihead_forward); \
  m.impl("_selected_multihead_attention_backward", multihead_backward)
#define HEADWISE_REGISTER_CORE(m)                      \
  m.impl("selected_attention", core);                  \
  m.impl("_selected_attention_forward", core_forward); \
  m.impl("_selected_attention_backward", core_backward)

/// Inputs of selected_self_attention.
struct SelfInputs {
  at::Tensor x, in_proj_weight;
  OptionalTensor in_proj_bias;
  at::Tensor out_proj_weight;
  OptionalTensor out_proj_bias;
  int64_t num_heads;
  at::Tensor index, count, weight;
  AttentionArguments arguments;
};

/// Inputs of selected_multihead_attention.
struct MultiheadInputs {
  at::Tensor query, key, value;
  ProjectionWeights weights;
  int64_t num_heads;
  at::Tensor index, count, weight;
  AttentionArguments arguments;
};

/// Inputs of selected_attention.
struct CoreInputs {
  at::Tensor q, k, v, index, count;
  OptionalTensor weight;
  AttentionArguments arguments;
};

/// What the layer's forward keeps for its backward (shapes in schemas.cpp).
struct LayerSaved {
  at::Tensor q, k, v, context, lse;
};

template <int N>
using Needs = std::array<bool, N>;

// Results of the internal operators.
using LayerForward =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using SelfBackward =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using MultiheadBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                     at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                     at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using CoreForward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using CoreBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher.
at::Tensor call(const SelfInputs& in);
at::Tensor call(const MultiheadInputs& in);
at::Tensor call(const CoreInputs& in);
LayerForward call_forward(const SelfInputs& in);
LayerForward call_forward(const MultiheadInputs& in);
CoreForward call_forward(const CoreInputs& in);
SelfBackward call_backward(const at::Tensor& grad_output, const SelfInputs& in,
                           const LayerSaved& saved, const Needs<7>& needs);
MultiheadBackward call_backward(const at::Tensor& grad_output, const MultiheadInputs& in,
                                const LayerSaved& saved, const Needs<15>& needs);
CoreBackward call_backward(const at::Tensor& grad_output, const CoreInputs& in,
                           const at::Tensor& output, const at::Tensor& context,
                           const at::Tensor& lse, const Needs<5>& needs);

// Checks of shapes, dtypes and devices; they read no values, so they hold for every device and
// while tracing. Each raises one sentence: the argument, the rule, the value.
void check_inputs(const SelfInputs& in);
void check_inputs(const MultiheadInputs& in);
void check_inputs(const CoreInputs& in);

/// Values of a selection (index in range and ascending, count in range); reads memory: CPU only.
void check_selection_values(const at::Tensor& index, const at::Tensor& count, int64_t num_heads);

/// Rows that bias_k/bias_v and add_zero_attn add to the keys.
inline int64_t added_rows(const ProjectionWeights& w) {
  return w.bias_k.has_value() + w.add_zero_attn;
}

/// Accumulation type of lse: float64 for float64, else float32.
at::ScalarType lse_type(at::ScalarType type);

}  // namespace headwise::ops

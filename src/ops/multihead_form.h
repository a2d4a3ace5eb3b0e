// The layer in its general form (query, key and value), for backends that run self-attention in it.
#pragma once

#include "ops/attention_ops.h"

namespace headwise::ops {

inline MultiheadInputs as_multihead(const SelfInputs& in) {
  const int64_t e = in.out_proj_weight.size(1);
  const auto rows = [&](const at::Tensor& t, int64_t n) { return t.narrow(0, n * e, e); };
  const auto biases = [&](int64_t n) {
    return in.in_proj_bias ? OptionalTensor(rows(*in.in_proj_bias, n)) : OptionalTensor();
  };
  return {in.x,
          in.x,
          in.x,
          {rows(in.in_proj_weight, 0),
           rows(in.in_proj_weight, 1),
           rows(in.in_proj_weight, 2),
           biases(0),
           biases(1),
           biases(2),
           in.out_proj_weight,
           in.out_proj_bias,
           {},
           {},
           false},
          in.num_heads,
          in.index,
          in.count,
          in.weight,
          in.arguments};
}

/// In the order of the arguments of selected_multihead_attention; undefined where not needed.
struct LayerGradients {
  at::Tensor query, key, value, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias,
      out_proj_weight, out_proj_bias, weight, bias_k, bias_v, attn_mask;
};

}  // namespace headwise::ops

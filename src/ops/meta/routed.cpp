// Shapes and dtypes of routed_multihead_attention, for tracing. Sizes stay symbolic.
#include "ops/routed.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/meta/shapes.h"

namespace headwise::ops {
namespace {

using at::Tensor;
using meta::empty;
using meta::gradient;

Tensor routed(HEADWISE_ROUTED_PARAMETERS) {
  check_inputs(HEADWISE_ROUTED_INPUTS);
  return empty(query, {query.sym_size(0), query.sym_size(1), out_proj_weight.sym_size(0)});
}

LayerForward routed_forward(HEADWISE_ROUTED_PARAMETERS) {
  const auto output = routed(query, key, value, q_weight, k_weight, v_weight, q_bias, k_bias,
                             v_bias, out_proj_weight, out_proj_bias, num_heads, chosen, weight,
                             bias_k, bias_v, add_zero_attn, HEADWISE_MASK_ARGUMENTS);
  const auto batch = query.sym_size(0), queries = query.sym_size(1),
             keys = key.sym_size(1) + (bias_k.has_value() + add_zero_attn);
  const auto d = num_heads ? q_weight.sym_size(0) / num_heads : c10::SymInt(0);
  const auto sums = at::empty({0}, query.options().dtype(lse_type(query.scalar_type())));
  return {output,
          empty(sums, {batch, num_heads, queries, d}),
          empty(sums, {batch, num_heads, keys, d}),
          empty(sums, {batch, num_heads, keys, d}),
          empty(sums, {batch, num_heads, queries, d}),
          empty(sums, {batch, num_heads, queries})};
}

MultiheadBackward routed_backward(const Tensor& grad_output, HEADWISE_ROUTED_PARAMETERS,
                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& context, const Tensor& lse,
                                  std::array<bool, 15> needs) {
  check_backward(grad_output, HEADWISE_ROUTED_INPUTS, {q, k, v, context, lse});
  return {gradient(needs[0], query, query),          gradient(needs[1], key, query),
          gradient(needs[2], value, query),          gradient(needs[3], q_weight, query),
          gradient(needs[4], k_weight, query),       gradient(needs[5], v_weight, query),
          gradient(needs[6], q_bias, query),         gradient(needs[7], k_bias, query),
          gradient(needs[8], v_bias, query),         gradient(needs[9], out_proj_weight, query),
          gradient(needs[10], out_proj_bias, query), gradient(needs[11], weight, query),
          gradient(needs[12], bias_k, query),        gradient(needs[13], bias_v, query),
          gradient(needs[14], attn_mask, query)};
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Meta, m) {
  m.impl("routed_multihead_attention", routed);
  m.impl("_routed_multihead_attention_forward", routed_forward);
  m.impl("_routed_multihead_attention_backward", routed_backward);
}

}  // namespace headwise::ops

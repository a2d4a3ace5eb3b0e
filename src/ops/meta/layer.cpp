// Shapes and dtypes of the operators that run a whole layer, for tracing. Sizes stay symbolic.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/attention_ops.h"
#include "ops/backward_checks.h"
#include "ops/meta/shapes.h"

namespace headwise::ops {
namespace {

using at::Tensor;
using meta::empty;
using meta::gradient;

LayerForward layer_forward(const Tensor& query, const c10::SymInt& keys, const Tensor& out_weight,
                           const c10::SymInt& e, int64_t num_heads, const Tensor& index) {
  const auto batch = query.sym_size(0), queries = query.sym_size(1), slots = index.sym_size(1);
  const auto d = num_heads ? e / num_heads : c10::SymInt(0);
  return {empty(query, {batch, queries, out_weight.sym_size(0)}),
          empty(query, {batch, slots, queries, d}),
          empty(query, {batch, slots, keys, d}),
          empty(query, {batch, slots, keys, d}),
          empty(query, {batch, slots, queries, d}),
          at::empty_symint({batch, slots, queries},
                           query.options().dtype(lse_type(query.scalar_type())))};
}

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) {
  check_inputs(HEADWISE_SELF_INPUTS);
  return layer_forward(x, x.sym_size(1), out_proj_weight, out_proj_weight.sym_size(1), num_heads,
                       index);
}

Tensor self(HEADWISE_SELF_PARAMETERS) {
  check_inputs(HEADWISE_SELF_INPUTS);
  return empty(x, {x.sym_size(0), x.sym_size(1), out_proj_weight.sym_size(0)});
}

SelfBackward self_backward(const Tensor& grad_output, HEADWISE_SELF_PARAMETERS, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& context,
                           const Tensor& lse, std::array<bool, 7> needs) {
  check_backward(grad_output, HEADWISE_SELF_INPUTS, {q, k, v, context, lse});
  return {gradient(needs[0], x, x),
          gradient(needs[1], in_proj_weight, x),
          gradient(needs[2], in_proj_bias, x),
          gradient(needs[3], out_proj_weight, x),
          gradient(needs[4], out_proj_bias, x),
          gradient(needs[5], weight, x),
          gradient(needs[6], attn_mask, x)};
}

LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
  check_inputs(HEADWISE_MULTIHEAD_INPUTS);
  const int64_t added = bias_k.has_value() + add_zero_attn;
  return layer_forward(query, key.sym_size(1) + added, out_proj_weight, q_weight.sym_size(0),
                       num_heads, index);
}

Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  check_inputs(HEADWISE_MULTIHEAD_INPUTS);
  return empty(query, {query.sym_size(0), query.sym_size(1), out_proj_weight.sym_size(0)});
}

MultiheadBackward multihead_backward(const Tensor& grad_output, HEADWISE_MULTIHEAD_PARAMETERS,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& context, const Tensor& lse,
                                     std::array<bool, 15> needs) {
  check_backward(grad_output, HEADWISE_MULTIHEAD_INPUTS, {q, k, v, context, lse});
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

TORCH_LIBRARY_IMPL(headwise, Meta, m) { HEADWISE_REGISTER_LAYER(m); }

}  // namespace headwise::ops

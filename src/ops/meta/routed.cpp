// Shapes and dtypes of routed_multihead_attention, for tracing. Sizes stay symbolic.
#include "ops/routed.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/meta/shapes.h"

namespace headwise::ops {
namespace {

using at::Tensor;

Tensor routed(HEADWISE_ROUTED_PARAMETERS) {
  check_inputs(HEADWISE_ROUTED_INPUTS);
  return meta::empty(query, {query.sym_size(0), query.sym_size(1), out_proj_weight.sym_size(0)});
}

LayerForward routed_forward(HEADWISE_ROUTED_PARAMETERS) {
  const auto in = HEADWISE_ROUTED_INPUTS;
  check_inputs(in);
  return meta::layer_forward(query, key.sym_size(1) + added_rows(in.weights), num_heads,
                             out_proj_weight, num_heads, lse_type(query.scalar_type()));
}

MultiheadBackward routed_backward(const Tensor& grad_output, HEADWISE_ROUTED_PARAMETERS,
                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& context, const Tensor& lse,
                                  std::array<bool, 15> needs) {
  const auto in = HEADWISE_ROUTED_INPUTS;
  check_backward(grad_output, in, {q, k, v, context, lse});
  return meta::gradients(in, needs, query);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Meta, m) {
  m.impl("routed_multihead_attention", routed);
  m.impl("_routed_multihead_attention_forward", routed_forward);
  m.impl("_routed_multihead_attention_backward", routed_backward);
}

}  // namespace headwise::ops

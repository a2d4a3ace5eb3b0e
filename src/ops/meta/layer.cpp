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

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) {
  check_inputs(HEADWISE_SELF_INPUTS);
  return meta::layer_forward(x, x.sym_size(1), index.sym_size(1), out_proj_weight, num_heads,
                             x.scalar_type());
}

Tensor self(HEADWISE_SELF_PARAMETERS) {
  check_inputs(HEADWISE_SELF_INPUTS);
  return empty(x, {x.sym_size(0), x.sym_size(1), out_proj_weight.sym_size(0)});
}

SelfBackward self_backward(const Tensor& grad_output, HEADWISE_SELF_PARAMETERS, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& context,
                           const Tensor& lse, std::array<bool, 7> needs) {
  const auto in = HEADWISE_SELF_INPUTS;
  check_backward(grad_output, in, {q, k, v, context, lse});
  return meta::gradients(in, needs, x);
}

LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
  const auto in = HEADWISE_MULTIHEAD_INPUTS;
  check_inputs(in);
  return meta::layer_forward(query, key.sym_size(1) + added_rows(in.weights), index.sym_size(1),
                             out_proj_weight, num_heads, query.scalar_type());
}

Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  check_inputs(HEADWISE_MULTIHEAD_INPUTS);
  return empty(query, {query.sym_size(0), query.sym_size(1), out_proj_weight.sym_size(0)});
}

MultiheadBackward multihead_backward(const Tensor& grad_output, HEADWISE_MULTIHEAD_PARAMETERS,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& context, const Tensor& lse,
                                     std::array<bool, 15> needs) {
  const auto in = HEADWISE_MULTIHEAD_INPUTS;
  check_backward(grad_output, in, {q, k, v, context, lse});
  return meta::gradients(in, needs, query);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Meta, m) { HEADWISE_REGISTER_LAYER(m); }

}  // namespace headwise::ops

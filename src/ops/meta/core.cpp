// Shapes and dtypes of selected_attention, for tracing. Sizes stay symbolic.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/attention_ops.h"
#include "ops/backward_checks.h"
#include "ops/meta/shapes.h"

namespace headwise::ops {
namespace {

using at::Tensor;
using meta::empty;

Tensor core(HEADWISE_CORE_PARAMETERS) {
  check_inputs(HEADWISE_CORE_INPUTS);
  return empty(q, {q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)});
}

CoreForward core_forward(HEADWISE_CORE_PARAMETERS) {
  auto output = core(q, k, v, index, count, weight, HEADWISE_MASK_ARGUMENTS);
  auto context = weight ? at::empty_like(output) : at::empty({0}, q.options());
  return {output, context,
          at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2)},
                           q.options().dtype(lse_type(q.scalar_type())))};
}

CoreBackward core_backward(const Tensor& grad_output, HEADWISE_CORE_PARAMETERS,
                           const Tensor& output, const Tensor& context, const Tensor& lse,
                           std::array<bool, 5> needs) {
  const auto in = HEADWISE_CORE_INPUTS;
  check_backward(grad_output, in, output, context, lse);
  return meta::gradients(in, needs, q);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Meta, m) { HEADWISE_REGISTER_CORE(m); }

}  // namespace headwise::ops

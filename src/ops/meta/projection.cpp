// Shapes and dtypes of the projections, for tracing. Sizes stay symbolic.
#include "ops/projection.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/backward_checks.h"

namespace headwise::ops {
namespace {

using at::Tensor;

Tensor gradient(bool wanted, const Tensor& like, c10::SymIntArrayRef sizes) {
  return wanted ? at::empty_symint(sizes, like.options()) : at::empty({0}, like.options());
}

Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
  check_inputs(HEADWISE_PROJECTION_INPUTS);
  const auto width = num_heads ? weight.sym_size(0) / num_heads : c10::SymInt(0);
  return at::empty_symint({x.sym_size(0), num_heads, x.sym_size(1), width}, x.options());
}

ProjectionBackward projection_backward(HEADWISE_PROJECTION_BACKWARD_PARAMETERS) {
  check_backward(grad_output, ProjectionInputs{x, weight, {}, num_heads, index, count});
  return {gradient(needs[0], x, x.sym_sizes()), gradient(needs[1], weight, weight.sym_sizes()),
          gradient(needs[2], weight, {weight.sym_size(0)})};
}

Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
  check_inputs(HEADWISE_OUTPUT_INPUTS);
  return at::empty_symint({heads.sym_size(0), heads.sym_size(2), weight.sym_size(0)},
                          heads.options());
}

OutputBackward output_projection_backward(HEADWISE_OUTPUT_BACKWARD_PARAMETERS) {
  check_backward(grad_output, OutputInputs{heads, weight, {}, index, count, head_weight});
  const auto& factor = head_weight ? *head_weight : heads;
  return {gradient(needs[0], heads, heads.sym_sizes()),
          gradient(needs[1], weight, weight.sym_sizes()),
          gradient(needs[2], weight, {weight.sym_size(0)}),
          gradient(needs[3] && head_weight, factor, factor.sym_sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Meta, m) { HEADWISE_REGISTER_PROJECTION(m); }

}  // namespace headwise::ops

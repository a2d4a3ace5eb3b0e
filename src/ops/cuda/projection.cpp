// The projections on CUDA devices: the ATen route (src/ops/aten).
#include <torch/library.h>

#include "ops/aten/projection.h"

namespace headwise::ops {
namespace {

using at::Tensor;

Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
  return aten::forward(HEADWISE_PROJECTION_INPUTS);
}
ProjectionBackward projection_backward(HEADWISE_PROJECTION_BACKWARD_PARAMETERS) {
  return aten::backward(grad_output, ProjectionInputs{x, weight, {}, num_heads, index, count},
                        needs);
}
Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
  return aten::forward(HEADWISE_OUTPUT_INPUTS);
}
OutputBackward output_projection_backward(HEADWISE_OUTPUT_BACKWARD_PARAMETERS) {
  return aten::backward(grad_output, OutputInputs{heads, weight, {}, index, count, head_weight},
                        needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CUDA, m) { HEADWISE_REGISTER_PROJECTION(m); }

}  // namespace headwise::ops

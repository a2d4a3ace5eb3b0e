// The projections of the chosen heads in C++: their inputs as structs, calls through the
// dispatcher, and the checks that all backends share. The schemas are in src/ops/schemas.cpp.
#pragma once

#include "ops/attention_ops.h"

namespace headwise::ops {

// The parameter lists of the schemas, as in attention_ops.h.
#define HEADWISE_PROJECTION_PARAMETERS                                                          \
  const at::Tensor &x, const at::Tensor &weight, const OptionalTensor &bias, int64_t num_heads, \
      const at::Tensor &index, const at::Tensor &count
#define HEADWISE_PROJECTION_BACKWARD_PARAMETERS                                                    \
  const at::Tensor &grad_output, const at::Tensor &x, const at::Tensor &weight, int64_t num_heads, \
      const at::Tensor &index, const at::Tensor &count, std::array<bool, 3> needs
#define HEADWISE_OUTPUT_BACKWARD_PARAMETERS                                                \
  const at::Tensor &grad_output, const at::Tensor &heads, const at::Tensor &weight,        \
      const at::Tensor &index, const at::Tensor &count, const OptionalTensor &head_weight, \
      std::array<bool, 4> needs
#define HEADWISE_PROJECTION_INPUTS \
  ::headwise::ops::ProjectionInputs { x, weight, bias, num_heads, index, count }
#define HEADWISE_OUTPUT_PARAMETERS                                               \
  const at::Tensor &heads, const at::Tensor &weight, const OptionalTensor &bias, \
      const at::Tensor &index, const at::Tensor &count, const OptionalTensor &head_weight
#define HEADWISE_OUTPUT_INPUTS \
  ::headwise::ops::OutputInputs { heads, weight, bias, index, count, head_weight }

// The functions that a backend registers, by name.
#define HEADWISE_REGISTER_PROJECTION(m)                         \
  m.impl("selected_projection", projection);                    \
  m.impl("_selected_projection_backward", projection_backward); \
  m.impl("selected_output_projection", output_projection);      \
  m.impl("_selected_output_projection_backward", output_projection_backward)

/// Inputs of selected_projection.
struct ProjectionInputs {
  at::Tensor x, weight;
  OptionalTensor bias;
  int64_t num_heads;
  at::Tensor index, count;
};

/// Inputs of selected_output_projection.
struct OutputInputs {
  at::Tensor heads, weight;
  OptionalTensor bias;
  at::Tensor index, count;
  OptionalTensor head_weight;
};

// Gradients of {x, weight, bias} and of {heads, weight, bias, head_weight}.
using ProjectionBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using OutputBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher.
at::Tensor call(const ProjectionInputs& in);
at::Tensor call(const OutputInputs& in);
ProjectionBackward call_backward(const at::Tensor& grad_output, const ProjectionInputs& in,
                                 const Needs<3>& needs);
OutputBackward call_backward(const at::Tensor& grad_output, const OutputInputs& in,
                             const Needs<4>& needs);

// Shapes, dtypes and devices, as in attention_ops.h (src/ops/attention_checks.cpp).
void check_inputs(const ProjectionInputs& in);
void check_inputs(const OutputInputs& in);

/// Columns of a head.
inline int64_t head_width(const ProjectionInputs& in) {
  return in.num_heads ? in.weight.size(0) / in.num_heads : 0;
}

}  // namespace headwise::ops

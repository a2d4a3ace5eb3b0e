// Registers the ATen route under names of its own, so that tests without a GPU hold it against
// the oracle. On a CUDA device it runs what the kernels refuse (src/ops/cuda/attention.cpp).
#include <torch/library.h>

#include "ops/aten/attention.h"
#include "ops/aten/projection.h"
#include "ops/backward_checks.h"

namespace headwise::ops::aten {
namespace {

using at::Tensor;

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) { return forward(HEADWISE_SELF_INPUTS); }
LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
  return forward(HEADWISE_MULTIHEAD_INPUTS);
}
CoreForward core_forward(HEADWISE_CORE_PARAMETERS) { return forward(HEADWISE_CORE_INPUTS); }

SelfBackward self_backward(const Tensor& grad_output, HEADWISE_SELF_PARAMETERS, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& context,
                           const Tensor& lse, std::array<bool, 7> needs) {
  return backward(grad_output, HEADWISE_SELF_INPUTS, LayerSaved{q, k, v, context, lse}, needs);
}
MultiheadBackward multihead_backward(const Tensor& grad_output, HEADWISE_MULTIHEAD_PARAMETERS,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& context, const Tensor& lse,
                                     std::array<bool, 15> needs) {
  return backward(grad_output, HEADWISE_MULTIHEAD_INPUTS, LayerSaved{q, k, v, context, lse}, needs);
}
CoreBackward core_backward(const Tensor& grad_output, HEADWISE_CORE_PARAMETERS,
                           const Tensor& output, const Tensor& context, const Tensor& lse,
                           std::array<bool, 5> needs) {
  const auto in = HEADWISE_CORE_INPUTS;
  check_backward(grad_output, in, output, context, lse);
  return backward(grad_output, in, weight ? context : output, needs);
}

Tensor projection(HEADWISE_PROJECTION_PARAMETERS) { return forward(HEADWISE_PROJECTION_INPUTS); }
ProjectionBackward projection_backward(HEADWISE_PROJECTION_BACKWARD_PARAMETERS) {
  return backward(grad_output, ProjectionInputs{x, weight, {}, num_heads, index, count}, needs);
}
Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) { return forward(HEADWISE_OUTPUT_INPUTS); }
OutputBackward output_projection_backward(HEADWISE_OUTPUT_BACKWARD_PARAMETERS) {
  return backward(grad_output, OutputInputs{heads, weight, {}, index, count, head_weight}, needs);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("_aten_self_attention_forward", self_forward);
  m.def("_aten_self_attention_backward", self_backward);
  m.def("_aten_multihead_attention_forward", multihead_forward);
  m.def("_aten_multihead_attention_backward", multihead_backward);
  m.def("_aten_attention_forward", core_forward);
  m.def("_aten_attention_backward", core_backward);
  m.def("_aten_projection", projection);
  m.def("_aten_projection_backward", projection_backward);
  m.def("_aten_output_projection", output_projection);
  m.def("_aten_output_projection_backward", output_projection_backward);
}

}  // namespace headwise::ops::aten

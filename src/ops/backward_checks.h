// Checks of the arguments of backward operators: the inputs again, and the results of forward. They
// can be called directly, so nothing is trusted: a buffer that is too small would be read past its
// end.
#pragma once

#include "ops/projection.h"

namespace headwise::ops {

// check_inputs() of the inputs, then the shapes, dtypes and devices of the rest.
void check_backward(const at::Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved);
void check_backward(const at::Tensor& grad_output, const MultiheadInputs& in,
                    const LayerSaved& saved);
void check_backward(const at::Tensor& grad_output, const CoreInputs& in, const at::Tensor& output,
                    const at::Tensor& context, const at::Tensor& lse);
void check_backward(const at::Tensor& grad_output, const ProjectionInputs& in);
void check_backward(const at::Tensor& grad_output, const OutputInputs& in);

}  // namespace headwise::ops

// The attention operators on the device, without waiting for it: the selection is read by kernels
// alone, every size follows from shapes, so a call can be captured in a CUDA graph and replayed
// with other selections.
#pragma once

#include <string>

#include "ops/attention_ops.h"

namespace headwise::ops::device {

/// Why the kernels cannot run these inputs; empty if they can. Depends on shapes alone, so forward
/// and backward agree.
std::string refusal(const MultiheadInputs& in);
std::string refusal(const SelfInputs& in);
std::string refusal(const CoreInputs& in);

/// Without `keep`, only the output: what a backward would read is undefined.
LayerForward forward(const SelfInputs& in, bool keep = true);
LayerForward forward(const MultiheadInputs& in, bool keep = true);
CoreForward forward(const CoreInputs& in);
SelfBackward backward(const at::Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                      const Needs<7>& needs);
MultiheadBackward backward(const at::Tensor& grad_output, const MultiheadInputs& in,
                           const LayerSaved& saved, const Needs<15>& needs);
CoreBackward backward(const at::Tensor& grad_output, const CoreInputs& in, const at::Tensor& output,
                      const at::Tensor& context, const at::Tensor& lse, const Needs<5>& needs);

}  // namespace headwise::ops::device

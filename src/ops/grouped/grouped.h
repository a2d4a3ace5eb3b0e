// The attention operators out of LibTorch's matrix products and attention, grouped by head: a
// correct path on every device, which computes the chosen heads and no others. It waits for the
// device once a call, to learn how many sequences chose each head.
#pragma once

#include "ops/attention_ops.h"
#include "ops/grouped/attention.h"
#include "ops/grouped/work_list.h"

namespace headwise::ops::grouped {

LayerForward forward(const SelfInputs& in);
LayerForward forward(const MultiheadInputs& in);
CoreForward forward(const CoreInputs& in);
SelfBackward backward(const at::Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                      const Needs<7>& needs);
MultiheadBackward backward(const at::Tensor& grad_output, const MultiheadInputs& in,
                           const LayerSaved& saved, const Needs<15>& needs);
CoreBackward backward(const at::Tensor& grad_output, const CoreInputs& in,
                      const at::Tensor& context, const Needs<5>& needs);

}  // namespace headwise::ops::grouped

// The ATen route: the attention operators out of LibTorch's matrix products and attention, a
// correct path on every device, which computes the chosen heads and no others. It waits for the
// device once a call, to learn how many sequences chose each head.
#pragma once

#include "ops/aten/pair_attention.h"
#include "ops/aten/work_list.h"
#include "ops/attention_ops.h"

namespace headwise::ops::aten {

LayerForward forward(const SelfInputs& in);
LayerForward forward(const MultiheadInputs& in);
CoreForward forward(const CoreInputs& in);
SelfBackward backward(const at::Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                      const Needs<7>& needs);
MultiheadBackward backward(const at::Tensor& grad_output, const MultiheadInputs& in,
                           const LayerSaved& saved, const Needs<15>& needs);
CoreBackward backward(const at::Tensor& grad_output, const CoreInputs& in,
                      const at::Tensor& context, const Needs<5>& needs);

}  // namespace headwise::ops::aten

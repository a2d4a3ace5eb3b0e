// The ATen route: the attention operators and their projections out of LibTorch's matrix products
// and attention, one head at a time. It is correct on every device and computes only the chosen
// heads. It waits for the device once per call, to learn how many sequences chose each head.
#pragma once

#include "ops/aten/projection.h"
#include "ops/attention_ops.h"

namespace headwise::ops::aten {

LayerForward forward(const SelfInputs& in);
LayerForward forward(const MultiheadInputs& in);
CoreForward forward(const CoreInputs& in);
// For arguments that check_backward() has seen.
SelfBackward backward(const at::Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                      const Needs<7>& needs);
MultiheadBackward backward(const at::Tensor& grad_output, const MultiheadInputs& in,
                           const LayerSaved& saved, const Needs<15>& needs);
CoreBackward backward(const at::Tensor& grad_output, const CoreInputs& in, const at::Tensor& output,
                      const at::Tensor& context, const at::Tensor& lse, const Needs<5>& needs);

struct Route {
  static auto forward(const auto& in) { return aten::forward(in); }
  static auto backward(const auto&... arguments) { return aten::backward(arguments...); }
};

}  // namespace headwise::ops::aten

// The derivative of the operators that run a whole layer: forward keeps the projections and the log
// of the softmax denominators of the chosen heads, backward is one operator.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/autograd/attention_function.h"

namespace headwise::ops {
namespace {

using at::Tensor;

Tensor self(HEADWISE_SELF_PARAMETERS) { return differentiate(HEADWISE_SELF_INPUTS); }
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) { return differentiate(HEADWISE_MULTIHEAD_INPUTS); }

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("selected_self_attention", self);
  m.impl("selected_multihead_attention", multihead);
  // Second derivatives raise: there are none.
  for (const char* name :
       {"_selected_self_attention_forward", "_selected_self_attention_backward",
        "_selected_multihead_attention_forward", "_selected_multihead_attention_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise::ops

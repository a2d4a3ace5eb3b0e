// The derivative of selected_attention: forward keeps the log of the softmax denominators of the
// chosen heads, backward is one operator.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/autograd/attention_function.h"

namespace headwise::ops {
namespace {

at::Tensor core(HEADWISE_CORE_PARAMETERS) { return differentiate(HEADWISE_CORE_INPUTS); }

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("selected_attention", core);
  // Second derivatives raise: there are none.
  for (const char* name : {"_selected_attention_forward", "_selected_attention_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise::ops

// The derivative of selected_attention: forward keeps the log of the softmax denominators of the
// chosen heads, backward is one operator.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/autograd/attention_function.h"

namespace headwise::ops {
using at::Tensor;

// Found by argument-dependent lookup, which does not see an unnamed namespace.
template <typename F>
static void visit(CoreInputs& in, const F& f) {
  f(in.q), f(in.k), f(in.v), f(in.index), f(in.count), f(in.weight), visit(in.arguments, f);
}

static Differentiable differentiable(const CoreInputs& in) {
  return {in.q, in.k, in.v, in.weight, floating(in.arguments.attn_mask)};
}

static int64_t* num_heads_of(CoreInputs&) { return nullptr; }
static bool* zero_row_of(CoreInputs&) { return nullptr; }

static Tensor run_forward(const CoreInputs& in, variable_list& results) {
  auto [output, context, lse] = call_forward(in);
  results = {output, context, lse};
  return output;
}
static CoreBackward run_backward(const Tensor& grad, const CoreInputs& in, const variable_list& r,
                                 const Needs<5>& needs) {
  return call_backward(grad, in, r[0], r[1], r[2], needs);
}

namespace {

Tensor core(HEADWISE_CORE_PARAMETERS) { return differentiate<5>(HEADWISE_CORE_INPUTS); }

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("selected_attention", core);
  // Second derivatives raise: there are none.
  for (const char* name : {"_selected_attention_forward", "_selected_attention_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise::ops

// The derivative of the operators that run a whole layer: forward keeps the projections and the log
// of the softmax denominators of the chosen heads, backward is one operator.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/autograd/attention_function.h"

namespace headwise::ops {
using at::Tensor;

// Found by argument-dependent lookup, which does not see an unnamed namespace.
template <typename F>
static void visit(SelfInputs& in, const F& f) {
  f(in.x), f(in.in_proj_weight), f(in.in_proj_bias), f(in.out_proj_weight), f(in.out_proj_bias);
  f(in.index), f(in.count), f(in.weight), visit(in.arguments, f);
}
template <typename F>
static void visit(MultiheadInputs& in, const F& f) {
  auto& w = in.weights;
  f(in.query), f(in.key), f(in.value), f(w.q_weight), f(w.k_weight), f(w.v_weight);
  f(w.q_bias), f(w.k_bias), f(w.v_bias), f(w.out_proj_weight), f(w.out_proj_bias);
  f(w.bias_k), f(w.bias_v), f(in.index), f(in.count), f(in.weight), visit(in.arguments, f);
}
static Differentiable differentiable(const SelfInputs& in) {
  return {in.x,
          in.in_proj_weight,
          in.in_proj_bias,
          in.out_proj_weight,
          in.out_proj_bias,
          in.weight,
          floating(in.arguments.attn_mask)};
}
static Differentiable differentiable(const MultiheadInputs& in) {
  const auto& w = in.weights;
  return {in.query,        in.key,    in.value, w.q_weight, w.k_weight,
          w.v_weight,      w.q_bias,  w.k_bias, w.v_bias,   w.out_proj_weight,
          w.out_proj_bias, in.weight, w.bias_k, w.bias_v,   floating(in.arguments.attn_mask)};
}

static int64_t* num_heads_of(SelfInputs& in) { return &in.num_heads; }
static int64_t* num_heads_of(MultiheadInputs& in) { return &in.num_heads; }
static bool* zero_row_of(SelfInputs&) { return nullptr; }
static bool* zero_row_of(MultiheadInputs& in) { return &in.weights.add_zero_attn; }

template <typename Inputs>
static Tensor run_forward(const Inputs& in, variable_list& results) {
  auto [output, q, k, v, context, lse] = call_forward(in);
  results = {q, k, v, context, lse};
  return output;
}
static SelfBackward run_backward(const Tensor& grad, const SelfInputs& in, const variable_list& r,
                                 const Needs<7>& needs) {
  return call_backward(grad, in, LayerSaved{r[0], r[1], r[2], r[3], r[4]}, needs);
}
static MultiheadBackward run_backward(const Tensor& grad, const MultiheadInputs& in,
                                      const variable_list& r, const Needs<15>& needs) {
  return call_backward(grad, in, LayerSaved{r[0], r[1], r[2], r[3], r[4]}, needs);
}

namespace {

Tensor self(HEADWISE_SELF_PARAMETERS) { return differentiate<7>(HEADWISE_SELF_INPUTS); }
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  return differentiate<15>(HEADWISE_MULTIHEAD_INPUTS);
}

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

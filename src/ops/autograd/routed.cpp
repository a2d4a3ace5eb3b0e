// The derivative of routed_multihead_attention, and its form for devices without a kernel.
#include "ops/routed.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "headwise/dense_attention.h"
#include "kernels/cpu/packed_gemm.h"
#include "ops/autograd/attention_function.h"

namespace headwise::ops {
using at::Tensor;

// Found by argument-dependent lookup, which does not see an unnamed namespace.
template <typename F>
static void visit(RoutedInputs& in, const F& f) {
  auto& w = in.weights;
  f(in.query), f(in.key), f(in.value), f(w.q_weight), f(w.k_weight), f(w.v_weight);
  f(w.q_bias), f(w.k_bias), f(w.v_bias), f(w.out_proj_weight), f(w.out_proj_bias);
  f(w.bias_k), f(w.bias_v), f(in.chosen), f(in.weight), visit(in.arguments, f);
}
static Differentiable differentiable(const RoutedInputs& in) {
  const auto& w = in.weights;
  return {in.query,        in.key,    in.value, w.q_weight, w.k_weight,
          w.v_weight,      w.q_bias,  w.k_bias, w.v_bias,   w.out_proj_weight,
          w.out_proj_bias, in.weight, w.bias_k, w.bias_v,   floating(in.arguments.attn_mask)};
}
static int64_t* num_heads_of(RoutedInputs& in) { return &in.num_heads; }
static bool* zero_row_of(RoutedInputs& in) { return &in.weights.add_zero_attn; }

static Tensor run_forward(const RoutedInputs& in, variable_list& results) {
  auto [output, q, k, v, context, lse] = call_forward(in);
  results = {q, k, v, context, lse};
  return output;
}
static MultiheadBackward run_backward(const Tensor& grad, const RoutedInputs& in,
                                      const variable_list& r, const Needs<15>& needs) {
  return call_backward(grad, in, LayerSaved{r[0], r[1], r[2], r[3], r[4]}, needs);
}

namespace {

/// Every head for every token, then the weights: what MoH's released code runs. Lists of tokens
/// would have to wait for the device. Dropout is LibTorch's own, whatever the seed.
Tensor mask_heads(const RoutedInputs& in) {
  check_inputs(in);
  const auto& w = in.weights;
  const auto [q, k, v] = project_heads(in.query, in.key, in.value, w, in.num_heads);
  const auto context = dense_attention(q, k, v, in.arguments,
                                       w.bias_k.has_value() + w.add_zero_attn);  // [B, H, L, d]
  const auto weights = in.weight.masked_fill(in.chosen.logical_not(), 0).to(context.scalar_type());
  return combine_heads(context * weights.transpose(1, 2).unsqueeze(-1), {}, w.out_proj_weight,
                       w.out_proj_bias);
}
Tensor masked(HEADWISE_ROUTED_PARAMETERS) { return mask_heads(HEADWISE_ROUTED_INPUTS); }

/// Whether all heads in bfloat16, on processors that multiply it, take less time than the chosen
/// ones: backward sums them in floats.
bool trains_faster_masked(const RoutedInputs& in) {
  if (in.query.scalar_type() != at::kBFloat16 || in.arguments.dropout_p > 0) return false;
  if (!at::GradMode::is_enabled() || !kernels::packed_gemm_supported<at::BFloat16>()) return false;
  for (const auto& t : differentiable(in))
    if (t && t->requires_grad()) return true;
  return false;
}

Tensor routed(HEADWISE_ROUTED_PARAMETERS) {
  const auto in = HEADWISE_ROUTED_INPUTS;
  return trains_faster_masked(in) ? mask_heads(in) : differentiate<15>(in);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("routed_multihead_attention", routed);
  // Second derivatives raise: there are none.
  for (const char* name :
       {"_routed_multihead_attention_forward", "_routed_multihead_attention_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("_aten_routed_multihead_attention", masked);
}
TORCH_LIBRARY_IMPL(headwise, AutogradCUDA, m) { m.impl("routed_multihead_attention", masked); }
TORCH_LIBRARY_IMPL(headwise, CUDA, m) { m.impl("routed_multihead_attention", masked); }

}  // namespace headwise::ops

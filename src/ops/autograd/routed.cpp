// The derivative of routed_multihead_attention, and its form for devices without a kernel.
#include "ops/routed.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "headwise/dense_attention.h"
#include "kernels/cpu/packed_gemm.h"
#include "ops/autograd/attention_function.h"

namespace headwise::ops {
namespace {

using at::Tensor;

/// Every head for every token, then the weights: what MoH's released code runs. Lists of tokens
/// would have to wait for the device. Dropout is LibTorch's own, whatever the seed.
Tensor mask_heads(const RoutedInputs& in) {
  check_inputs(in);
  const auto& w = in.weights;
  const auto [q, k, v] = project_heads(in.query, in.key, in.value, w, in.num_heads);
  const auto context = dense_attention(q, k, v, in.arguments,
                                       added_rows(w));  // [B, H, L, d]
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
  return trains_faster_masked(in) ? mask_heads(in) : differentiate(in);
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

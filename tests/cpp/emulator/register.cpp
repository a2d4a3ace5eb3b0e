// torch.ops.headwise_emulated: what a CUDA device runs, on the host. tests/python/test_emulated.py
// loads it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cuda/budget_gate.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/selected.h"

namespace headwise::ops::device {
namespace {

using at::Tensor;

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) { return forward(HEADWISE_SELF_INPUTS); }
LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
  return forward(HEADWISE_MULTIHEAD_INPUTS);
}
CoreForward core_forward(HEADWISE_CORE_PARAMETERS) { return forward(HEADWISE_CORE_INPUTS); }
SelfBackward self_backward(const Tensor& grad_output, HEADWISE_SELF_PARAMETERS, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& context,
                           const Tensor& lse, std::array<bool, 7> needs) {
  return backward(grad_output, HEADWISE_SELF_INPUTS, LayerSaved{q, k, v, context, lse}, needs);
}
MultiheadBackward multihead_backward(const Tensor& grad_output, HEADWISE_MULTIHEAD_PARAMETERS,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& context, const Tensor& lse,
                                     std::array<bool, 15> needs) {
  return backward(grad_output, HEADWISE_MULTIHEAD_INPUTS, LayerSaved{q, k, v, context, lse}, needs);
}
CoreBackward core_backward(const Tensor& grad_output, HEADWISE_CORE_PARAMETERS,
                           const Tensor& output, const Tensor& context, const Tensor& lse,
                           std::array<bool, 5> needs) {
  return backward(grad_output, HEADWISE_CORE_INPUTS, output, context, lse, needs);
}

Tensor select_heads(const Tensor& relevance, const Tensor& count) {
  const auto counts = count.to(at::kLong).contiguous();
  auto index = at::empty(relevance.sizes(), relevance.options().dtype(at::kInt));
  check_launch(kernels::cuda::select_heads(
      relevance.const_data_ptr(), element_of(relevance.scalar_type()),
      counts.const_data_ptr<int64_t>(), index.mutable_data_ptr<int32_t>(), relevance.size(0),
      relevance.size(1), current_stream()));
  return index;
}

}  // namespace

TORCH_LIBRARY(headwise_emulated, m) {
  m.def("self_attention_forward", self_forward);
  m.def("self_attention_backward", self_backward);
  m.def("multihead_attention_forward", multihead_forward);
  m.def("multihead_attention_backward", multihead_backward);
  m.def("attention_forward", core_forward);
  m.def("attention_backward", core_backward);
  m.def("budget_gate", budget_gate);
  m.def("select_heads", select_heads);
  m.def("takes_budget_gate", takes_budget_gate);
}

}  // namespace headwise::ops::device

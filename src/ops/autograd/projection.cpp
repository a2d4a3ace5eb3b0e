// The derivative of the projections: backward is one operator, and reads nothing but the inputs.
#include "ops/projection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace headwise::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool tracked(std::initializer_list<OptionalTensor> tensors) {
  for (const auto& t : tensors)
    if (t && (t->_fw_grad(0).defined() || (at::GradMode::is_enabled() && t->requires_grad())))
      return true;
  return false;
}

// Autograd numbers the tensors that were given; an absent bias has no number.

struct ProjectionFunction : torch::autograd::Function<ProjectionFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, int64_t num_heads, const Tensor& index,
                        const Tensor& count) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, index, count});
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["bias"] = bias.has_value();
    return call(HEADWISE_PROJECTION_INPUTS);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const bool bias = ctx->saved_data["bias"].toBool();
    const Needs<3> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                         bias && ctx->needs_input_grad(2)};
    const auto [x, weight, grad_bias] = call_backward(
        grad_outputs[0],
        {saved[0], saved[1], {}, ctx->saved_data["num_heads"].toInt(), saved[2], saved[3]}, needs);
    return {needs[0] ? x : Tensor(),
            needs[1] ? weight : Tensor(),
            needs[2] ? grad_bias : Tensor(),
            {},
            {},
            {}};
  }
};

struct OutputFunction : torch::autograd::Function<OutputFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& heads, const Tensor& weight,
                        const OptionalTensor& bias, const Tensor& index, const Tensor& count,
                        const OptionalTensor& head_weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({heads, weight, index, count, head_weight.value_or(Tensor())});
    ctx->saved_data["bias"] = bias.has_value();
    return call(HEADWISE_OUTPUT_INPUTS);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const bool bias = ctx->saved_data["bias"].toBool();
    const OptionalTensor factor = saved[4].defined() ? OptionalTensor(saved[4]) : OptionalTensor();
    const Needs<4> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                         bias && ctx->needs_input_grad(2),
                         factor && ctx->needs_input_grad(4 + bias)};
    const auto [heads, weight, grad_bias, head_weight] =
        call_backward(grad_outputs[0], {saved[0], saved[1], {}, saved[2], saved[3], factor}, needs);
    return {needs[0] ? heads : Tensor(),
            needs[1] ? weight : Tensor(),
            needs[2] ? grad_bias : Tensor(),
            {},
            {},
            needs[3] ? head_weight : Tensor()};
  }
};

Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
  if (tracked({x, weight, bias}))
    return ProjectionFunction::apply(x, weight, bias, num_heads, index, count);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call(HEADWISE_PROJECTION_INPUTS);
}

Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
  if (tracked({heads, weight, bias, head_weight}))
    return OutputFunction::apply(heads, weight, bias, index, count, head_weight);
  at::AutoDispatchBelowADInplaceOrView guard;
  return call(HEADWISE_OUTPUT_INPUTS);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("selected_projection", projection);
  m.impl("selected_output_projection", output_projection);
  // Second derivatives raise: there are none.
  for (const char* name : {"_selected_projection_backward", "_selected_output_projection_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise::ops

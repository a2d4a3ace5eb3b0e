#include "ops/gates/fused.h"

#include <ATen/core/grad_mode.h>
#include <ATen/functorch/DynamicLayer.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <utility>

namespace headwise {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Kept : torch::CustomClassHolder {
  FusedStep step;
  size_t inputs = 0;
};

/// The gradients through the composed step, with a graph of their own.
variable_list through_operators(const FusedStep& step, const variable_list& inputs,
                                const variable_list& gradients, const std::vector<bool>& needs) {
  const auto outputs = step.compose(inputs);
  variable_list from, by, to;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!gradients[i].defined() || !outputs[i].defined() || !outputs[i].requires_grad()) continue;
    from.push_back(outputs[i]);
    by.push_back(gradients[i]);
  }
  for (size_t i = 0; i < inputs.size(); ++i)
    if (needs[i]) to.push_back(inputs[i]);
  variable_list result(inputs.size());
  if (from.empty() || to.empty()) return result;
  const auto found = torch::autograd::grad(from, to, by, /*retain_graph=*/true,
                                           /*create_graph=*/true, /*allow_unused=*/true);
  for (size_t i = 0, next = 0; i < inputs.size(); ++i)
    if (needs[i]) result[i] = found[next++];
  return result;
}

struct FusedFunction : torch::autograd::Function<FusedFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs,
                               const c10::intrusive_ptr<Kept>& kept) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [outputs, saved] = std::exchange(kept->step.forward, nullptr)();
    variable_list constant;
    for (const auto i : kept->step.constant) constant.push_back(outputs[i]);
    ctx->mark_non_differentiable(constant);
    ctx->set_materialize_grads(false);
    saved.insert(saved.begin(), inputs.begin(), inputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["step"] = c10::IValue::make_capsule(kept);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto capsule = ctx->saved_data["step"].toCapsule();
    const auto& kept = static_cast<const Kept&>(*capsule);
    auto saved = ctx->get_saved_variables();
    const auto end = saved.begin() + static_cast<int64_t>(kept.inputs);
    const variable_list inputs(saved.begin(), end);
    saved.erase(saved.begin(), end);
    std::vector<bool> needs(inputs.size());
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = ctx->needs_input_grad(i);
    auto result = at::GradMode::is_enabled()
                      ? through_operators(kept.step, inputs, gradients, needs)
                      : kept.step.backward(gradients, inputs, saved);
    for (size_t i = 0; i < needs.size(); ++i)
      if (!needs[i]) result[i] = Tensor();
    result.emplace_back();  // the step
    return result;
  }
};

}  // namespace

bool fuses(std::initializer_list<Tensor> tensors) {
  if (at::functorch::maybeCurrentDynamicLayer().has_value()) return false;
  for (const auto& t : tensors) {
    if (!t.defined()) continue;
    const auto keys = t.key_set();
    if (!t.is_cpu() || t.layout() != at::kStrided || keys.has(c10::DispatchKey::Python) ||
        keys.has(c10::DispatchKey::Functionalize) || t._fw_grad(/*level=*/0).defined())
      return false;
  }
  return true;
}

bool needs_gradient(std::initializer_list<Tensor> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const auto& t : tensors)
    if (t.defined() && t.requires_grad()) return true;
  return false;
}

std::tuple<Tensor, Tensor> choice_backward(const Tensor& grad_weight, const Tensor& grad_expected,
                                           const Tensor& slope, const Tensor& expected_slope,
                                           const Tensor& share) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  using Optional = std::optional<Tensor>;
  static const auto op = operator_handle<std::tuple<Tensor, Tensor>(
      const Optional&, const Optional&, const Tensor&, const Optional&, const Optional&)>(
      "headwise::_choice_backward");
  return op.call(if_defined(grad_weight), if_defined(grad_expected), slope,
                 if_defined(expected_slope), if_defined(share));
}

FusedStep::Tensors run_differentiable(const FusedStep::Tensors& inputs, FusedStep step) {
  auto kept = c10::make_intrusive<Kept>();
  kept->step = std::move(step);
  kept->inputs = inputs.size();
  return FusedFunction::apply(at::TensorList(inputs), kept);
}

}  // namespace headwise

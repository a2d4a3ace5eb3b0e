// Steps of a gate as one operator on a CPU: a hundred operators on a few dozen numbers cost more
// than a layer's heads. The same steps of ATen's operators run everywhere else, and give second
// derivatives.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

namespace headwise {

/// Products in the type of their factors: autocast would narrow them, also inside a kernel.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet(c10::DispatchKey::AutocastCPU)};
};

/// Whether an operator with a kernel and a derivative of its own may run on these tensors
/// (undefined ones are left out): strided, on a CPU, on no tape but autograd's, and not traced by a
/// compiler.
bool fuses(std::initializer_list<at::Tensor> tensors);

/// Whether autograd would record an operator on one of these.
bool needs_gradient(std::initializer_list<at::Tensor> tensors);

inline at::Tensor or_undefined(const std::optional<at::Tensor>& t) {
  return t.value_or(at::Tensor());
}

/// A tensor, or none where it is undefined.
inline std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

/// Scores of the types that the kernels compute in.
inline bool takes_numbers(const at::Tensor& scores) {
  return scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble;
}
inline bool takes_progress(const at::Tensor& progress) {
  return at::isFloatingType(progress.scalar_type()) && progress.sym_numel() == 1;
}

/// The gradients of scores and budget: headwise::_choice_backward. Undefined: none.
std::tuple<at::Tensor, at::Tensor> choice_backward(const at::Tensor& grad_weight,
                                                   const at::Tensor& grad_expected,
                                                   const at::Tensor& slope,
                                                   const at::Tensor& expected_slope,
                                                   const at::Tensor& share);

struct FusedStep {
  using Tensors = std::vector<at::Tensor>;
  struct Results {
    Tensors outputs, saved;
  };
  std::function<Results()> forward;
  /// Gradients of the inputs; the gradient of an output may be undefined.
  std::function<Tensors(const Tensors& gradients, const Tensors& inputs, const Tensors& saved)>
      backward;
  /// The outputs, by ATen's operators, for derivatives of the derivative.
  std::function<Tensors(const Tensors& inputs)> compose;
  std::vector<size_t> constant;  ///< outputs that have no gradient
};

/// The outputs, with a derivative with respect to `inputs`.
FusedStep::Tensors run_differentiable(const FusedStep::Tensors& inputs, FusedStep step);

/// An operator of this library, called through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace headwise

// The attention operators of CUDA devices: the kernels where they take the inputs, else the ATen
// route (src/ops/aten), which waits for the device once per call.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "ops/backward_checks.h"
#include "ops/cuda/selected.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/arguments.h"
#include "ops/cuda/launch.h"
#endif
#include "ops/aten/attention.h"

namespace headwise::ops {
namespace {

using at::Tensor;

/// True if the kernels run these inputs. Says once why they did not.
template <typename Inputs>
bool kernels_run(const Inputs& in) {
#ifdef HEADWISE_CUDA
  auto reason = device::refusal(in);
  if (!device_fits(in.index.device())) reason = device_refusal(in.index.device());
  if (reason.empty()) return true;
  TORCH_WARN_ONCE("headwise: the ATen route runs instead of the CUDA kernels: ", reason);
#endif
  return false;
}

template <typename Inputs>
auto forward(const Inputs& in) {
#ifdef HEADWISE_CUDA
  if (kernels_run(in)) return device::forward(in);
#endif
  return aten::forward(in);
}
template <typename Inputs, typename Needs>
auto backward(const Tensor& grad_output, const Inputs& in, const LayerSaved& saved,
              const Needs& needs) {
  check_backward(grad_output, in, saved);
#ifdef HEADWISE_CUDA
  if (kernels_run(in)) return device::backward(grad_output, in, saved, needs);
#endif
  return aten::backward(grad_output, in, saved, needs);
}

LayerForward self_forward(HEADWISE_SELF_PARAMETERS) { return forward(HEADWISE_SELF_INPUTS); }
LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
  return forward(HEADWISE_MULTIHEAD_INPUTS);
}
CoreForward core_forward(HEADWISE_CORE_PARAMETERS) { return forward(HEADWISE_CORE_INPUTS); }

template <typename Inputs>
Tensor output(const Inputs& in) {
#ifdef HEADWISE_CUDA
  if (kernels_run(in)) return std::get<0>(device::forward(in, /*keep=*/false));
#endif
  return std::get<0>(aten::forward(in));
}
Tensor self(HEADWISE_SELF_PARAMETERS) { return output(HEADWISE_SELF_INPUTS); }
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) { return output(HEADWISE_MULTIHEAD_INPUTS); }
Tensor core(HEADWISE_CORE_PARAMETERS) { return std::get<0>(forward(HEADWISE_CORE_INPUTS)); }

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
  const auto in = HEADWISE_CORE_INPUTS;
  check_backward(grad_output, in, output, context, lse);
#ifdef HEADWISE_CUDA
  if (kernels_run(in)) return device::backward(grad_output, in, output, context, lse, needs);
#endif
  return aten::backward(grad_output, in, in.weight ? context : output, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CUDA, m) {
  HEADWISE_REGISTER_LAYER(m);
  HEADWISE_REGISTER_CORE(m);
}

#ifdef HEADWISE_CUDA
// What every layer does first, by itself, for benchmarks: the lists as one int32 tensor.
TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("_work_list(Tensor index, Tensor count, int num_heads) -> Tensor");
}
TORCH_LIBRARY_IMPL(headwise, CUDA, m) {
  m.impl("_work_list", [](const Tensor& index, const Tensor& count, int64_t num_heads) {
    return device::select(index, count, num_heads).lists;
  });
}
#endif

}  // namespace headwise::ops

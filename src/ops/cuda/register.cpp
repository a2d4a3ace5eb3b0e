// What CUDA devices run: the kernels if they support the inputs, else the ATen route
// (src/ops/aten), which waits for the device once per call.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "ops/aten/attention.h"
#include "ops/attention_statistics.h"
#include "ops/route.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/arguments.h"
#include "ops/cuda/attention_statistics.h"
#include "ops/cuda/budget_gate.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/selected.h"
#endif

namespace headwise::ops {
namespace {

using at::Tensor;

/// True if the kernels run these inputs. Otherwise warns, once, about the reason.
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

struct Route {
  template <typename Inputs>
  static auto forward(const Inputs& in) {
#ifdef HEADWISE_CUDA
    if (kernels_run(in)) return device::forward(in);
#endif
    return aten::forward(in);
  }
  template <typename Inputs, typename... Rest>
  static auto backward(const Tensor& grad_output, const Inputs& in, const Rest&... rest) {
#ifdef HEADWISE_CUDA
    if (kernels_run(in)) return device::backward(grad_output, in, rest...);
#endif
    return aten::backward(grad_output, in, rest...);
  }
};

template <typename Inputs>
Tensor output(const Inputs& in) {
#ifdef HEADWISE_CUDA
  if (kernels_run(in)) return std::get<0>(device::forward(in, /*keep=*/false));
#endif
  return std::get<0>(aten::forward(in));
}
Tensor self(HEADWISE_SELF_PARAMETERS) { return output(HEADWISE_SELF_INPUTS); }
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) { return output(HEADWISE_MULTIHEAD_INPUTS); }
Tensor core(HEADWISE_CORE_PARAMETERS) { return std::get<0>(Route::forward(HEADWISE_CORE_INPUTS)); }
constexpr auto self_forward = Registered<Route>::self_forward;
constexpr auto self_backward = Registered<Route>::self_backward;
constexpr auto multihead_forward = Registered<Route>::multihead_forward;
constexpr auto multihead_backward = Registered<Route>::multihead_backward;
constexpr auto core_forward = Registered<Route>::core_forward;
constexpr auto core_backward = Registered<Route>::core_backward;

// The projections around selected_attention have no kernels.
constexpr auto projection = Registered<aten::Route>::projection;
constexpr auto projection_backward = Registered<aten::Route>::projection_backward;
constexpr auto output_projection = Registered<aten::Route>::output_projection;
constexpr auto output_projection_backward = Registered<aten::Route>::output_projection_backward;

// If the kernels were not compiled, or the device is too old for them.
Statistics statistics_on_host(HEADWISE_STATISTICS_PARAMETERS) {
  const auto host = [](const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(t->cpu()) : std::nullopt;
  };
  check_inputs({HEADWISE_STATISTICS_ARGUMENTS});
  auto [entropy, confidence] =
      headwise::attention_statistics(q.cpu(), k.cpu(), host(key_padding_mask),
                                     host(query_padding_mask), host(attn_mask), is_causal, scale);
  return {entropy.to(q.device()), confidence.to(q.device())};
}

Statistics statistics(HEADWISE_STATISTICS_PARAMETERS) {
#ifdef HEADWISE_CUDA
  if (device_fits(q.device())) {
    check_inputs({HEADWISE_STATISTICS_ARGUMENTS});
    return device::attention_statistics(HEADWISE_STATISTICS_ARGUMENTS);
  }
#endif
  return statistics_on_host(HEADWISE_STATISTICS_ARGUMENTS);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CUDA, m) {
  HEADWISE_REGISTER_LAYER(m);
  HEADWISE_REGISTER_CORE(m);
  HEADWISE_REGISTER_PROJECTION(m);
  m.impl("attention_statistics", statistics);
#ifdef HEADWISE_CUDA
  m.impl("_budget_gate", device::budget_gate);
  m.impl("_work_list", [](const Tensor& index, const Tensor& count, int64_t num_heads) {
    return device::select(index, count, num_heads).lists;
  });
#endif
}

}  // namespace headwise::ops

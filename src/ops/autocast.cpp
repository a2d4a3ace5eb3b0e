// Under torch.autocast the attention operators run in the autocast dtype, as linear and
// scaled_dot_product_attention do. Head weights and masks keep their dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/input_tensors.h"

namespace headwise::ops {
namespace {

using at::Tensor;

template <c10::DeviceType device, typename Inputs>
Tensor cast_and_call(Inputs in) {
  struct Cast {
    void operator()(Tensor& t) const {
      t = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
    }
    void operator()(OptionalTensor& t) const {
      if (t) (*this)(*t);
    }
  };
  visit_factors(in, Cast{});
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  return call(in);
}

template <c10::DeviceType device>
Tensor self(HEADWISE_SELF_PARAMETERS) {
  return cast_and_call<device>(HEADWISE_SELF_INPUTS);
}
template <c10::DeviceType device>
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  return cast_and_call<device>(HEADWISE_MULTIHEAD_INPUTS);
}
template <c10::DeviceType device>
Tensor routed(HEADWISE_ROUTED_PARAMETERS) {
  return cast_and_call<device>(HEADWISE_ROUTED_INPUTS);
}
template <c10::DeviceType device>
Tensor core(HEADWISE_CORE_PARAMETERS) {
  return cast_and_call<device>(HEADWISE_CORE_INPUTS);
}
template <c10::DeviceType device>
Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
  return cast_and_call<device>(HEADWISE_PROJECTION_INPUTS);
}
template <c10::DeviceType device>
Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
  return cast_and_call<device>(HEADWISE_OUTPUT_INPUTS);
}

template <c10::DeviceType device>
void implement(torch::Library& m) {
  m.impl("selected_self_attention", self<device>);
  m.impl("selected_multihead_attention", multihead<device>);
  m.impl("routed_multihead_attention", routed<device>);
  m.impl("selected_attention", core<device>);
  m.impl("selected_projection", projection<device>);
  m.impl("selected_output_projection", output_projection<device>);
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, AutocastCPU, m) { implement<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(headwise, AutocastCUDA, m) { implement<c10::DeviceType::CUDA>(m); }

}  // namespace headwise::ops

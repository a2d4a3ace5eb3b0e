// Under torch.autocast the attention operators run in the autocast dtype, as linear and
// scaled_dot_product_attention do. Head weights and masks keep their dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/attention_ops.h"
#include "ops/projection.h"
#include "ops/routed.h"

namespace headwise::ops {
namespace {

using at::Tensor;

struct Cast {
  c10::DeviceType device;
  Tensor operator()(const Tensor& t) const {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }
  OptionalTensor operator()(const OptionalTensor& t) const {
    return t ? OptionalTensor((*this)(*t)) : t;
  }
};

template <c10::DeviceType device>
c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
}

template <c10::DeviceType device>
Tensor self(HEADWISE_SELF_PARAMETERS) {
  const Cast cast{device};
  auto guard = without_autocast<device>();
  return call(SelfInputs{cast(x),
                         cast(in_proj_weight),
                         cast(in_proj_bias),
                         cast(out_proj_weight),
                         cast(out_proj_bias),
                         num_heads,
                         index,
                         count,
                         weight,
                         {HEADWISE_MASK_ARGUMENTS}});
}

template <c10::DeviceType device>
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  const Cast cast{device};
  auto guard = without_autocast<device>();
  return call(MultiheadInputs{
      cast(query),
      cast(key),
      cast(value),
      {cast(q_weight), cast(k_weight), cast(v_weight), cast(q_bias), cast(k_bias), cast(v_bias),
       cast(out_proj_weight), cast(out_proj_bias), cast(bias_k), cast(bias_v), add_zero_attn},
      num_heads,
      index,
      count,
      weight,
      {HEADWISE_MASK_ARGUMENTS}});
}

template <c10::DeviceType device>
Tensor routed(HEADWISE_ROUTED_PARAMETERS) {
  const Cast cast{device};
  auto guard = without_autocast<device>();
  return call(RoutedInputs{
      cast(query),
      cast(key),
      cast(value),
      {cast(q_weight), cast(k_weight), cast(v_weight), cast(q_bias), cast(k_bias), cast(v_bias),
       cast(out_proj_weight), cast(out_proj_bias), cast(bias_k), cast(bias_v), add_zero_attn},
      num_heads,
      chosen,
      weight,
      {HEADWISE_MASK_ARGUMENTS}});
}

template <c10::DeviceType device>
Tensor core(HEADWISE_CORE_PARAMETERS) {
  const Cast cast{device};
  auto guard = without_autocast<device>();
  return call(
      CoreInputs{cast(q), cast(k), cast(v), index, count, weight, {HEADWISE_MASK_ARGUMENTS}});
}

template <c10::DeviceType device>
Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
  const Cast cast{device};
  auto guard = without_autocast<device>();
  return call(ProjectionInputs{cast(x), cast(weight), cast(bias), num_heads, index, count});
}

template <c10::DeviceType device>
Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
  const Cast cast{device};
  auto guard = without_autocast<device>();
  return call(OutputInputs{cast(heads), cast(weight), cast(bias), index, count, head_weight});
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, AutocastCPU, m) {
  m.impl("selected_self_attention", self<c10::DeviceType::CPU>);
  m.impl("selected_multihead_attention", multihead<c10::DeviceType::CPU>);
  m.impl("routed_multihead_attention", routed<c10::DeviceType::CPU>);
  m.impl("selected_attention", core<c10::DeviceType::CPU>);
  m.impl("selected_projection", projection<c10::DeviceType::CPU>);
  m.impl("selected_output_projection", output_projection<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(headwise, AutocastCUDA, m) {
  m.impl("selected_self_attention", self<c10::DeviceType::CUDA>);
  m.impl("selected_multihead_attention", multihead<c10::DeviceType::CUDA>);
  m.impl("routed_multihead_attention", routed<c10::DeviceType::CUDA>);
  m.impl("selected_attention", core<c10::DeviceType::CUDA>);
  m.impl("selected_projection", projection<c10::DeviceType::CUDA>);
  m.impl("selected_output_projection", output_projection<c10::DeviceType::CUDA>);
}

}  // namespace headwise::ops

#include "ops/cuda/attention_statistics.h"

#include <ATen/ATen.h>

#include <cmath>

#include "ops/cuda/launch.h"

namespace headwise::ops::device {
namespace {

void copy_strides(const at::Tensor& t, int64_t (&strides)[4]) {
  for (int i = 0; i < 4; ++i) strides[i] = t.stride(i);
}

}  // namespace

Statistics attention_statistics(HEADWISE_STATISTICS_PARAMETERS) {
  const DeviceGuard guard(q.device());
  const auto type = statistics_type(q.scalar_type());
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), d = q.size(3), S = k.size(2);
  if (B == 0 || H == 0 || L == 0) {
    const auto nothing = at::zeros({B, H}, q.options().dtype(type));
    return {nothing, nothing.clone()};
  }
  kernels::cuda::StatisticsArguments a{};
  a.type = element_of(q.scalar_type());
  a.batch = B, a.num_heads = H, a.kv_heads = k.size(1), a.queries = L, a.keys = S, a.width = d;
  a.scale = scale.value_or(d ? 1 / std::sqrt(static_cast<double>(d)) : 1.0);
  a.causal = is_causal;
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr();
  copy_strides(q, a.q_stride);
  copy_strides(k, a.k_stride);
  at::Tensor key_mask, query_mask, mask;  // keep alive what the arguments point to
  if (key_padding_mask) {
    const bool boolean = key_padding_mask->scalar_type() == at::kBool;
    key_mask = (boolean ? *key_padding_mask : key_padding_mask->to(type)).contiguous();
    if (boolean) {
      a.key_forbid = key_mask.const_data_ptr<bool>();
    } else {
      a.key_add = key_mask.const_data_ptr();
    }
  }
  if (query_padding_mask) {
    query_mask = query_padding_mask->contiguous();
    a.query_padding = query_mask.const_data_ptr<bool>();
  }
  if (attn_mask) {
    const bool boolean = attn_mask->scalar_type() == at::kBool;
    mask = (boolean ? *attn_mask : attn_mask->to(type)).expand({B, H, L, S});
    if (boolean) {
      a.mask_forbid = mask.const_data_ptr<bool>();
    } else {
      a.mask_add = mask.const_data_ptr();
    }
    copy_strides(mask, a.mask_stride);
  }
  const auto options = q.options().dtype(at::kDouble);
  auto sums = at::empty({B, H, kernels::cuda::statistics_row_tiles(L), 2}, options);
  a.sums = sums.mutable_data_ptr<double>();
  check_launch(kernels::cuda::attention_statistics(a, current_stream()));
  // Rows that count, per sequence; the sum over tiles has a fixed order.
  const auto rows = query_padding_mask
                        ? query_mask.logical_not().sum(1, false, at::kDouble).clamp_min_(1)
                        : at::full({B}, L, options);                   // [B]
  const auto means = sums.sum(2).div_(rows.view({B, 1, 1})).to(type);  // [B, H, 2]
  return {means.select(2, 0).contiguous(), means.select(2, 1).contiguous()};
}

}  // namespace headwise::ops::device

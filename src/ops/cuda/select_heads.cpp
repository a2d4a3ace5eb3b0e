#include "ops/select_heads.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/launch.h"
#endif

namespace headwise::ops {
namespace {

at::Tensor select_heads_cuda(const at::Tensor& relevance, const at::Tensor& count) {
  check_select_heads(relevance, count);
#ifdef HEADWISE_CUDA
  if (device_fits(relevance.device())) {
    const DeviceGuard guard(relevance.device());
    const auto scores = relevance.contiguous();            // [B, H]
    const auto counts = count.to(at::kLong).contiguous();  // [B]
    auto index = at::empty(relevance.sizes(), relevance.options().dtype(at::kInt));
    check_launch(kernels::cuda::select_heads(
        scores.const_data_ptr(), element_of(scores.scalar_type()), counts.const_data_ptr<int64_t>(),
        index.mutable_data_ptr<int32_t>(), scores.size(0), scores.size(1), current_stream()));
    return index;
  }
#endif
  return headwise::select_heads(relevance.cpu(), count.cpu()).to(relevance.device());
}

// A few ATen calls, none of which waits for the device. Places after count, and heads out of range,
// go to an extra column that is cut off.
at::Tensor selection_mask_cuda(const at::Tensor& index, const at::Tensor& count,
                               at::ScalarType dtype) {
  check_selection_mask(index, count);
  const int64_t B = index.size(0), H = index.size(1);
  const auto heads = index.to(at::kLong);                          // [B, H]
  const auto place = at::arange(H, heads.options()).unsqueeze(0);  // [1, H]
  const auto valid =
      place.lt(count.unsqueeze(1)).logical_and_(heads.ge(0)).logical_and_(heads.lt(H));
  return at::zeros({B, H + 1}, index.options().dtype(dtype))
      .scatter_(1, heads.masked_fill(valid.logical_not(), H), 1)
      .narrow(1, 0, H)
      .contiguous();
}

// The groups of the chosen heads by a few ATen calls, then a top k of the marks.
std::tuple<at::Tensor, at::Tensor> select_groups_cuda(const at::Tensor& index,
                                                      const at::Tensor& count, int64_t num_heads,
                                                      int64_t num_groups) {
  check_select_groups(index, count, num_heads, num_groups);
  const int64_t B = index.size(0);
  const auto heads = index.to(at::kLong);                                      // [B, K]
  const auto place = at::arange(index.size(1), heads.options()).unsqueeze(0);  // [1, K]
  const auto valid =
      place.lt(count.unsqueeze(1)).logical_and_(heads.ge(0)).logical_and_(heads.lt(num_heads));
  const auto groups = heads.floor_divide(num_groups ? num_heads / num_groups : 1);  // [B, K]
  const auto marks = at::zeros({B, num_groups + 1}, index.options().dtype(at::kFloat))
                         .scatter_(1, groups.masked_fill(valid.logical_not(), num_groups), 1)
                         .narrow(1, 0, num_groups);  // [B, G]
  const auto used = marks.sum(1).to(at::kInt);       // [B]
  return {headwise::select_heads(marks, used), used};
}

TORCH_LIBRARY_IMPL(headwise, CUDA, m) {
  m.impl("select_heads", select_heads_cuda);
  m.impl("selection_mask", selection_mask_cuda);
  m.impl("select_groups", select_groups_cuda);
}

}  // namespace
}  // namespace headwise::ops

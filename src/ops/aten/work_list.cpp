#include "ops/aten/work_list.h"

#include <ATen/ATen.h>

#include "kernels/cuda/indexing.h"
#include "ops/attention_ops.h"
#include "ops/select_heads.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/launch.h"
#endif

namespace headwise::ops::aten {
namespace {

using at::Tensor;
using kernels::cuda::WorkListOutput;
using kernels::cuda::WorkListShape;

/// The device's list by one thread.
void host_work_list(const WorkListShape& shape, const int32_t* index, const int32_t* count,
                    int32_t* slot, const WorkListOutput& out) {
  kernels::cuda::clear_slots(shape, 0, 1, slot, out);
  kernels::cuda::mark_slots(shape, 0, 1, index, count, slot, out);
  const int32_t total = kernels::cuda::count_chunk(shape, 0, 1, slot);
  kernels::cuda::write_chunk(shape, 0, 1, slot, 0, total, out);
}

#ifdef HEADWISE_CUDA
kernels::cuda::HeadCopyShape copy_shape(const Tensor& t, int64_t group) {
  return {t.size(2), t.size(3), group, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
#endif

}  // namespace

Tensor WorkList::batches() const { return batch.narrow(0, 0, size()).to(at::kLong); }
Tensor WorkList::batches(int64_t h) const {
  return batch.narrow(0, begin(h), count(h)).to(at::kLong);
}
Tensor WorkList::heads() const { return head.narrow(0, 0, size()).to(at::kLong); }

WorkList make_work_list(const Tensor& index, const Tensor& count, int64_t num_heads) {
  const WorkListShape shape{index.size(0), index.size(1), num_heads};
  // Without our kernels a CUDA device's selection, a few hundred numbers, is listed on the host.
#ifdef HEADWISE_CUDA
  const bool on_device = index.is_cuda() && device_fits(index.device());
#else
  const bool on_device = false;
#endif
  const auto place = on_device ? index.device() : at::Device(at::kCPU);
  const auto options = at::TensorOptions().dtype(at::kInt).device(place);
  if (index.is_cpu()) check_selection_values(index, count, num_heads);
  const auto indices = narrowed(index).to(place).contiguous(),
             counts = narrowed(count).to(place).contiguous();
  auto slot = at::empty({shape.slots()}, options);
  WorkList list{at::empty({shape.capacity()}, options),
                at::empty({shape.capacity()}, options),
                at::empty({num_heads + 1}, options),
                {}};
  const WorkListOutput out{list.batch.mutable_data_ptr<int32_t>(),
                           list.head.mutable_data_ptr<int32_t>(),
                           list.offset.mutable_data_ptr<int32_t>()};
  if (on_device) {
#ifdef HEADWISE_CUDA
    const DeviceGuard guard(place);
    check_launch(kernels::cuda::work_list(shape, indices.const_data_ptr<int32_t>(),
                                          counts.const_data_ptr<int32_t>(),
                                          slot.mutable_data_ptr<int32_t>(), out, current_stream()));
#endif
  } else {
    host_work_list(shape, indices.const_data_ptr<int32_t>(), counts.const_data_ptr<int32_t>(),
                   slot.mutable_data_ptr<int32_t>(), out);
  }
  const auto offset = list.offset.cpu();
  const auto* first = offset.const_data_ptr<int32_t>();
  list.first.assign(first, first + num_heads + 1);
  list.batch = list.batch.to(index.device());
  list.head = list.head.to(index.device());
  list.offset = list.offset.to(index.device());
  return list;
}

Tensor gather_heads(const Tensor& tensor, const WorkList& list, int64_t group) {
#ifdef HEADWISE_CUDA
  if (tensor.is_cuda() && device_fits(tensor.device())) {
    const DeviceGuard guard(tensor.device());
    auto packed = at::empty({list.size(), tensor.size(2), tensor.size(3)}, tensor.options());
    check_launch(kernels::cuda::gather_heads(
        copy_shape(tensor, group), tensor.const_data_ptr(), static_cast<int>(tensor.element_size()),
        list.batch.const_data_ptr<int32_t>(), list.head.const_data_ptr<int32_t>(), list.size(),
        packed.mutable_data_ptr(), current_stream()));
    return packed;
  }
#endif
  const auto heads = list.heads();
  return tensor.index({list.batches(), group == 1 ? heads : heads.floor_divide(group)});
}

Tensor scatter_heads(const Tensor& packed, const WorkList& list, int64_t batch, int64_t num_heads) {
  auto tensor = at::zeros({batch, num_heads, packed.size(1), packed.size(2)}, packed.options());
#ifdef HEADWISE_CUDA
  if (tensor.is_cuda() && device_fits(tensor.device())) {
    const DeviceGuard guard(tensor.device());
    const auto source = packed.contiguous();
    check_launch(kernels::cuda::scatter_heads(
        copy_shape(tensor, 1), source.const_data_ptr(), static_cast<int>(source.element_size()),
        list.batch.const_data_ptr<int32_t>(), list.head.const_data_ptr<int32_t>(), list.size(),
        tensor.mutable_data_ptr(), current_stream()));
    return tensor;
  }
#endif
  return tensor.index_put_({list.batches(), list.heads()}, packed);
}

}  // namespace headwise::ops::aten

#include "ops/cuda/arguments.h"

#include <ATen/ATen.h>

#include "ops/cuda/launch.h"
#include "ops/select_heads.h"

namespace headwise::ops::device {

using at::Tensor;

Selected select(const Tensor& index, const Tensor& count, int64_t num_heads, int64_t length) {
  const DeviceGuard guard(index.device());
  const int64_t B = index.size(0), K = index.size(1), capacity = B * K;
  const auto options = index.options().dtype(at::kInt);
  const auto indices = narrowed(index).contiguous(), counts = narrowed(count).contiguous();
  const kernels::cuda::WorkListShape shape{B, K, num_heads};
  // One allocation: five lists of places, begins, used, count, first, offset, scratch.
  Selected s;
  s.lists = at::empty({6 * capacity + 2 * B + num_heads + 3 + 2 * shape.slots()}, options);
  int32_t* next = s.lists.mutable_data_ptr<int32_t>();
  const auto take = [&](int64_t size) {
    int32_t* const first = next;
    next += size;
    return first;
  };
  kernels::cuda::WorkListOutput out;
  out.packed_head = take(capacity);
  int32_t *const begins = take(capacity + 1), *const used = take(shape.slots());
  if (length) out.length = length, out.begins = begins, out.used = used;
  out.place_head = take(capacity), out.place = take(capacity);
  out.batch = take(capacity), out.head = take(capacity);
  out.count = take(B), out.first = take(B + 1), out.offset = take(num_heads + 1);
  check_launch(kernels::cuda::work_list(shape, indices.const_data_ptr<int32_t>(),
                                        counts.const_data_ptr<int32_t>(), take(shape.slots()), out,
                                        current_stream()));
  s.packed_head = s.lists.narrow(0, 0, capacity);
  s.begins = s.lists.narrow(0, capacity, capacity + 1);
  s.used = s.lists.narrow(0, 2 * capacity + 1, shape.slots());
  s.chosen = {B, K, num_heads, out.place_head, out.count, out.place, out.offset, out.first};
  return s;
}

Masks::Masks(const AttentionArguments& arguments, at::ScalarType type, at::Device device,
             int64_t batch, int64_t num_heads, int64_t queries, int64_t keys) {
  auto& a = prepared_;
  a.causal = arguments.is_causal;
  const auto accumulator = lse_type(type);
  if (arguments.key_padding_mask) {
    const bool boolean = arguments.key_padding_mask->scalar_type() == at::kBool;
    key = (boolean ? *arguments.key_padding_mask : arguments.key_padding_mask->to(accumulator))
              .contiguous();  // [B, S]
    if (boolean)
      a.key_forbid = key.const_data_ptr<bool>();
    else
      a.key_add = key.const_data_ptr();
    limit = at::empty({2, batch}, key.options().dtype(at::kInt));
    int32_t* const limits = limit.mutable_data_ptr<int32_t>();
    check_launch(kernels::cuda::key_limits(a.key_forbid, a.key_add, element_of(accumulator), batch,
                                           keys, limits, limits + batch, current_stream()));
    a.plain = limits + batch;
    a.limit = limit.const_data_ptr<int32_t>();
  }
  if (arguments.attn_mask) {
    const auto& mask = *arguments.attn_mask;
    const bool boolean = mask.scalar_type() == at::kBool;
    attention = (boolean ? mask : mask.to(accumulator)).expand({batch, num_heads, queries, keys});
    if (boolean)
      a.mask_forbid = attention.const_data_ptr<bool>();
    else
      a.mask_add = attention.const_data_ptr();
    for (int i = 0; i < 4; ++i) a.mask_stride[i] = attention.stride(i);
  }
  if (arguments.dropout_p > 0) {
    seed = arguments.dropout_seed->to(device).contiguous();
    a.dropout_seed = seed.const_data_ptr<int64_t>();
    a.dropout_p = arguments.dropout_p;
  }
}

const int32_t* Masks::limits() const { return prepared_.limit; }

void Masks::apply(PairAttentionArguments& a) const {
  const auto& p = prepared_;
  a.causal = p.causal;
  a.limit = p.limit, a.plain = p.plain;
  a.key_forbid = p.key_forbid, a.key_add = p.key_add;
  a.mask_forbid = p.mask_forbid, a.mask_add = p.mask_add;
  for (int i = 0; i < 4; ++i) a.mask_stride[i] = p.mask_stride[i];
  a.dropout_seed = p.dropout_seed, a.dropout_p = p.dropout_p;
}

Tensor dense_rows(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

Rows rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Units units(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

Units packed_units(const Tensor& t) {
  return {t.const_data_ptr(), 0, t.size(2) * t.size(3), t.size(3)};
}

bool aligned(const Tensor& t) {
  const auto size = static_cast<int64_t>(t.element_size());
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    if (t.size(i) > 1 && t.stride(i) * size % 16) return false;
  return true;
}

}  // namespace headwise::ops::device

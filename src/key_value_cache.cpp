#include "headwise/key_value_cache.h"

#include <ATen/ATen.h>

namespace headwise {

std::tuple<at::Tensor, at::Tensor> KeyValueCache::update(const at::Tensor& new_k,
                                                         const at::Tensor& new_v) {
  k = k.defined() ? at::cat({k, new_k}, 2) : new_k;
  v = v.defined() ? at::cat({v, new_v}, 2) : new_v;
  return {k, v};
}

void KeyValueCache::select_rows(const at::Tensor& rows) {
  const auto select = [&](at::Tensor& tensor) {
    if (tensor.defined()) tensor = tensor.index_select(0, rows.to(tensor.device()));
  };
  for (auto* tensor : {&k, &v, &slots}) select(*tensor);
  if (!selection) return;
  for (auto* tensor : {&selection->index, &selection->count, &selection->weight,
                       &selection->relevance, &selection->budget}) {
    select(*tensor);
  }
}

void KeyValueCache::crop(int64_t length) {
  TORCH_CHECK_VALUE(length >= 0, "length must not be negative, got ", length);
  if (length == 0) {
    *this = KeyValueCache();
  } else if (length < size()) {
    k = k.narrow(2, 0, length);
    v = v.narrow(2, 0, length);
  }
}

}  // namespace headwise

#include "headwise/key_value_cache.h"

#include <ATen/ATen.h>

#include <utility>

namespace headwise {

std::tuple<at::Tensor, at::Tensor> KeyValueCache::update(const at::Tensor& new_k,
                                                         const at::Tensor& new_v) {
  // Both before either is stored: one may not fit.
  auto all_k = k.defined() ? at::cat({k, new_k}, 2) : new_k;
  auto all_v = v.defined() ? at::cat({v, new_v}, 2) : new_v;
  k = std::move(all_k);
  v = std::move(all_v);
  return {k, v};
}

void KeyValueCache::select_rows(const at::Tensor& rows) {
  KeyValueCache selected = *this;  // all before any is stored: one may not fit
  const auto select = [&](at::Tensor& tensor) {
    if (tensor.defined()) tensor = tensor.index_select(0, rows.to(tensor.device()));
  };
  for (auto* tensor : {&selected.k, &selected.v, &selected.slots}) select(*tensor);
  if (auto& own = selected.selection) {
    for (auto* tensor : {&own->index, &own->count, &own->weight, &own->relevance, &own->budget}) {
      select(*tensor);
    }
  }
  *this = std::move(selected);
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

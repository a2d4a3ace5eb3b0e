#include "headwise/selection.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>

namespace headwise {

at::Tensor select_heads(const at::Tensor& relevance, const at::Tensor& count) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("headwise::select_heads", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  return op.call(relevance, count);
}

at::Tensor selection_mask(const at::Tensor& index, const at::Tensor& count, at::ScalarType dtype) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("headwise::selection_mask", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::ScalarType)>();
  return op.call(index, count, dtype);
}

std::tuple<at::Tensor, at::Tensor> select_groups(const at::Tensor& index, const at::Tensor& count,
                                                 int64_t num_heads, int64_t num_groups) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("headwise::select_groups", "")
                       .typed<std::tuple<at::Tensor, at::Tensor>(
                           const at::Tensor&, const at::Tensor&, int64_t, int64_t)>();
  return op.call(index, count, num_heads, num_groups);
}

Selection select_all(int64_t batch, int64_t num_heads, const at::TensorOptions& weight) {
  auto ints = weight.dtype(at::kInt).requires_grad(false);
  return {at::arange(num_heads, ints).expand({batch, num_heads}).contiguous(),
          at::full({batch}, num_heads, ints),
          at::ones({batch, num_heads}, weight),
          {},
          {}};
}

}  // namespace headwise

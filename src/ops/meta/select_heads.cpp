#include "ops/select_heads.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace headwise::ops {
namespace {

at::Tensor select_heads_meta(const at::Tensor& relevance, const at::Tensor& count) {
  check_select_heads(relevance, count);
  return at::empty_symint(relevance.sym_sizes(), relevance.options().dtype(at::kInt));
}

at::Tensor selection_mask_meta(const at::Tensor& index, const at::Tensor& count,
                               at::ScalarType dtype) {
  check_selection_mask(index, count);
  return at::empty_symint(index.sym_sizes(), index.options().dtype(dtype));
}

std::tuple<at::Tensor, at::Tensor> select_groups_meta(const at::Tensor& index,
                                                      const at::Tensor& count, int64_t num_heads,
                                                      int64_t num_groups) {
  check_select_groups(index, count, num_heads, num_groups);
  const auto options = index.options().dtype(at::kInt);
  return {at::empty_symint({index.sym_size(0), num_groups}, options),
          at::empty_symint({index.sym_size(0)}, options)};
}

TORCH_LIBRARY_IMPL(headwise, Meta, m) {
  m.impl("select_heads", select_heads_meta);
  m.impl("selection_mask", selection_mask_meta);
  m.impl("select_groups", select_groups_meta);
}

}  // namespace
}  // namespace headwise::ops

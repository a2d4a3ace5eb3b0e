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

TORCH_LIBRARY_IMPL(headwise, Meta, m) {
  m.impl("select_heads", select_heads_meta);
  m.impl("selection_mask", selection_mask_meta);
}

}  // namespace
}  // namespace headwise::ops

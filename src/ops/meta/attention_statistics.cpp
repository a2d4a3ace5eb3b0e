#include "ops/attention_statistics.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace headwise::ops {
namespace {

Statistics statistics_meta(HEADWISE_STATISTICS_PARAMETERS) {
  check_inputs({HEADWISE_STATISTICS_ARGUMENTS});
  const auto options = q.options().dtype(statistics_type(q.scalar_type()));
  const c10::SymInt sizes[2] = {q.sym_size(0), q.sym_size(1)};
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

TORCH_LIBRARY_IMPL(headwise, Meta, m) { m.impl("attention_statistics", statistics_meta); }

}  // namespace
}  // namespace headwise::ops

#include "ops/budget_gate.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace headwise::ops {
namespace {

// Shapes and dtypes, for tracing.
GateResult traced(HEADWISE_BUDGET_GATE_PARAMETERS) {
  const auto batch = x.sym_size(0), heads = base.sym_size(0);
  const auto whole = x.options().dtype(at::kInt);
  const auto sums = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_symint({batch, heads}, whole), at::empty_symint({batch}, whole),
          at::empty_symint({batch, heads}, x.options()), at::empty_symint({batch, heads}, sums),
          at::empty_symint({batch}, sums)};
}

TORCH_LIBRARY_IMPL(headwise, Meta, m) { m.impl("_budget_gate", traced); }

}  // namespace
}  // namespace headwise::ops

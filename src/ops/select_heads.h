// Checks that select_heads, selection_mask and select_groups share on every device (shapes and
// dtypes; values are checked where reading them costs nothing, on the CPU). Sizes are SymInts: Meta
// uses these too.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>

namespace headwise::ops {

/// More heads than any layer has: a number of heads is a size that is allocated.
constexpr int64_t kMostHeads = 65'536;

inline void check_heads(int64_t heads, const char* name) {
  TORCH_CHECK_VALUE(heads >= 0 && heads <= kMostHeads, name, " must be in 0..", kMostHeads,
                    ", got ", heads);
}

/// int32, by values that stay what they are or stay outside 0..2^31 - 2: one that does not fit must
/// not wrap around to a head. For devices, whose values nothing reads to check them.
inline at::Tensor narrowed(const at::Tensor& heads) {
  if (heads.scalar_type() == at::kInt) return heads;
  return heads.clamp(-1, std::numeric_limits<int32_t>::max()).to(at::kInt);
}

inline void check_count(const at::Tensor& count, const c10::SymInt& batch) {
  TORCH_CHECK_TYPE(count.scalar_type() == at::kInt || count.scalar_type() == at::kLong,
                   "count must be int32 or int64, got ", count.scalar_type());
  TORCH_CHECK_VALUE(count.dim() == 1 && count.sym_size(0) == batch, "count must have shape [",
                    batch, "], one number per sequence, got ", count.sym_sizes());
}

inline void check_select_heads(const at::Tensor& relevance, const at::Tensor& count) {
  TORCH_CHECK_VALUE(relevance.dim() == 2, "relevance must have shape [batch, heads], got ",
                    relevance.sym_sizes());
  TORCH_CHECK_TYPE(relevance.is_floating_point(), "relevance must be a floating-point tensor, got ",
                   relevance.scalar_type());
  check_count(count, relevance.sym_size(0));
  TORCH_CHECK_VALUE(relevance.device() == count.device(),
                    "relevance and count must be on one device, got ", relevance.device(), " and ",
                    count.device());
}

inline void check_selection_mask(const at::Tensor& index, const at::Tensor& count) {
  TORCH_CHECK_VALUE(index.dim() == 2, "index must have shape [batch, heads], got ",
                    index.sym_sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong,
                   "index must be int32 or int64, got ", index.scalar_type());
  check_count(count, index.sym_size(0));
  TORCH_CHECK_VALUE(index.device() == count.device(), "index and count must be on one device, got ",
                    index.device(), " and ", count.device());
}

inline void check_select_groups(const at::Tensor& index, const at::Tensor& count, int64_t num_heads,
                                int64_t num_groups) {
  check_selection_mask(index, count);
  check_heads(num_heads, "num_heads");
  TORCH_CHECK_VALUE(index.sym_size(1) <= num_heads,
                    "index must have at most num_heads = ", num_heads, " columns, got shape ",
                    index.sym_sizes());
  TORCH_CHECK_VALUE(
      num_groups > 0 ? num_heads % num_groups == 0 : num_heads == 0 && num_groups == 0,
      "num_groups must divide num_heads (", num_heads, "), got ", num_groups);
}

}  // namespace headwise::ops

#include "ops/select_heads.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "kernels/selection.h"
#include "ops/attention_ops.h"

namespace headwise::ops {
namespace {

at::Tensor select_heads_cpu(const at::Tensor& relevance, const at::Tensor& count) {
  check_select_heads(relevance, count);
  const int64_t B = relevance.size(0), H = relevance.size(1);
  const auto scores = relevance.contiguous();            // [B, H]
  const auto counts = count.to(at::kLong).contiguous();  // [B]
  auto index = at::empty({B, H}, relevance.options().dtype(at::kInt).requires_grad(false));
  const int64_t* counts_p = counts.const_data_ptr<int64_t>();
  int32_t* index_p = index.mutable_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, scores.scalar_type(), "select_heads", [&] {
        const scalar_t* scores_p = scores.const_data_ptr<scalar_t>();
        for (int64_t b = 0; b < B; ++b) {
          const scalar_t* row = scores_p + b * H;
          int32_t* out = index_p + b * H;
          const int64_t k = counts_p[b];
          TORCH_CHECK_VALUE(k >= 0 && k <= H, "count must lie in [0, ", H, "], got ", k, " at row ",
                            b);
          for (int64_t h = 0; h < H; ++h) {
            TORCH_CHECK_VALUE(std::isfinite(static_cast<double>(row[h])),
                              "relevance must be finite, got ", static_cast<double>(row[h]),
                              " at row ", b, ", head ", h);
          }
          auto load = [row](int64_t h) { return row[h]; };
          int64_t written = 0;
          for (int64_t h = 0; h < H && written < k; ++h) {
            if (k == H || kernels::selection_rank(load, h, H) < k)
              out[written++] = static_cast<int32_t>(h);
          }
          std::fill(out + written, out + H, -1);
        }
      });
  return index;
}

at::Tensor selection_mask_cpu(const at::Tensor& index, const at::Tensor& count,
                              at::ScalarType dtype) {
  check_selection_mask(index, count);
  const int64_t B = index.size(0), H = index.size(1);
  const auto indices = index.to(at::kLong).contiguous();  // [B, H]
  const auto counts = count.to(at::kLong).contiguous();   // [B]
  auto mask = at::zeros({B, H}, index.options().dtype(dtype));
  const int64_t* indices_p = indices.const_data_ptr<int64_t>();
  const int64_t* counts_p = counts.const_data_ptr<int64_t>();
  AT_DISPATCH_ALL_TYPES_AND3(at::kHalf, at::kBFloat16, at::kBool, dtype, "selection_mask", [&] {
    scalar_t* mask_p = mask.mutable_data_ptr<scalar_t>();
    for (int64_t b = 0; b < B; ++b) {
      const int64_t k = counts_p[b];
      TORCH_CHECK_VALUE(k >= 0 && k <= H, "count must lie in [0, ", H, "], got ", k, " at row ", b);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t h = indices_p[b * H + i];
        TORCH_CHECK_INDEX(h >= 0 && h < H, "index must lie in [0, ", H,
                          ") for the first count heads, got ", h, " at row ", b, ", position ", i);
        mask_p[b * H + h] = static_cast<scalar_t>(1);
      }
    }
  });
  return mask;
}

std::tuple<at::Tensor, at::Tensor> select_groups_cpu(const at::Tensor& index,
                                                     const at::Tensor& count, int64_t num_heads,
                                                     int64_t num_groups) {
  check_select_groups(index, count, num_heads, num_groups);
  check_selection_values(index, count, num_heads);
  const int64_t B = index.size(0), K = index.size(1);
  const auto heads = index.to(at::kInt).contiguous();   // [B, K]
  const auto chosen = count.to(at::kInt).contiguous();  // [B]
  const auto options = index.options().dtype(at::kInt);
  auto groups = at::full({B, num_groups}, -1, options), used = at::empty({B}, options);
  const int32_t *heads_p = heads.const_data_ptr<int32_t>(),
                *chosen_p = chosen.const_data_ptr<int32_t>();
  int32_t *groups_p = groups.mutable_data_ptr<int32_t>(),
          *used_p = used.mutable_data_ptr<int32_t>();
  const int64_t shared = num_groups ? num_heads / num_groups : 1;  // heads of a group
  for (int64_t b = 0; b < B; ++b) {
    int32_t n = 0;
    int32_t* const row = groups_p + b * num_groups;
    for (int32_t i = 0; i < chosen_p[b]; ++i) {  // ascending heads: ascending groups
      const auto group = static_cast<int32_t>(heads_p[b * K + i] / shared);
      if (n == 0 || row[n - 1] != group) row[n++] = group;
    }
    used_p[b] = n;
  }
  return {groups, used};
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("select_heads", select_heads_cpu);
  m.impl("selection_mask", selection_mask_cpu);
  m.impl("select_groups", select_groups_cpu);
}

}  // namespace
}  // namespace headwise::ops

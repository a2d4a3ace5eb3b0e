// The active (sequence, head) pairs of a selection, grouped by head, and copies of their rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace headwise::ops::aten {

/// N pairs: those of head 0 first; within a head, sequences ascend.
struct WorkList {
  at::Tensor batch, head;      ///< int32 [B * K] on the device of the selection; -1 after N
  at::Tensor offset;           ///< int32 [H + 1], same device
  std::vector<int64_t> first;  ///< `offset` on the host
  int64_t size() const { return first.back(); }  ///< N
  int64_t begin(int64_t h) const { return first[h]; }
  int64_t count(int64_t h) const { return first[h + 1] - first[h]; }
  at::Tensor batches() const;           ///< int64 [N]
  at::Tensor batches(int64_t h) const;  ///< int64 [count(h)]
  at::Tensor heads() const;             ///< int64 [N]
};

/// index [B, K], count [B]. Building the list does not wait for the device; reading `first`, which
/// sizes the matrix products that follow, does, once.
WorkList make_work_list(const at::Tensor& index, const at::Tensor& count, int64_t num_heads);

/// The rows of the active heads: tensor [B, Hs, R, w] -> packed [N, R, w]; head h reads h / group.
at::Tensor gather_heads(const at::Tensor& tensor, const WorkList& list, int64_t group = 1);

/// packed [N, R, w] -> [B, H, R, w], zeros where no pair points.
at::Tensor scatter_heads(const at::Tensor& packed, const WorkList& list, int64_t batch,
                         int64_t num_heads);

}  // namespace headwise::ops::aten

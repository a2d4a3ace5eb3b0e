// A selection says which heads run for each sequence, in what order and with what weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "headwise/export.h"

namespace headwise {

/// Which heads of a layer run, per sequence. All shapes are fixed, so nothing that consumes a
/// selection has to wait for a device or recompile.
struct Selection {
  at::Tensor index;   ///< int32 [B, H]: row b starts with count[b] head numbers, ascending; rest -1
  at::Tensor count;   ///< int32 [B]: 0 <= count <= H
  at::Tensor weight;  ///< float [B, H]: multiplies a head's output; 0 if not chosen
  at::Tensor relevance;  ///< float [B, H]: the gate's scores of the heads; may be undefined
  at::Tensor budget;     ///< float [B]: requested fraction of heads; may be undefined
};

/// Hard top-k per row: the `count[b]` heads of largest `relevance[b]`, as the `index` of a
/// Selection. Ties go to the lower head.
/// @param relevance floating [B, H]
/// @param count     int32 or int64 [B], 0 <= count <= H
/// @return int32 [B, H]
/// @throws c10::ValueError on wrong shapes, a count out of range or (CPU) non-finite relevance.
HEADWISE_API at::Tensor select_heads(const at::Tensor& relevance, const at::Tensor& count);

/// float-like mask [B, H] with ones at the chosen heads of `index`/`count`, in `dtype`.
HEADWISE_API at::Tensor selection_mask(const at::Tensor& index, const at::Tensor& count,
                                       at::ScalarType dtype);

/// The key/value heads that the chosen query heads read, if num_heads / num_groups query heads
/// share one (grouped-query attention, Ainslie et al. 2023): the selection that projects them.
/// @param index, count  int32 or int64 [B, K] and [B], of query heads, K <= num_heads
/// @return {index int32 [B, num_groups], count int32 [B]}
/// @throws c10::ValueError if num_groups does not divide num_heads; and, on a CPU, like the
/// attention operators if the selection is invalid.
HEADWISE_API std::tuple<at::Tensor, at::Tensor> select_groups(const at::Tensor& index,
                                                              const at::Tensor& count,
                                                              int64_t num_heads,
                                                              int64_t num_groups);

/// Every head of every sequence, weight one.
HEADWISE_API Selection select_all(int64_t batch, int64_t num_heads,
                                  const at::TensorOptions& weight);

}  // namespace headwise

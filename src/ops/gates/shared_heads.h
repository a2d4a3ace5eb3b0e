// Operators of the shared-heads gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace headwise {

/// The order of H heads in which the routed ones come first and the shared ones [s] last, both
/// ascending -> int64 [H].
at::Tensor routed_first(const at::Tensor& shared, int64_t num_heads);

/// {index, count, weight, relevance} over H heads from a selection among the H - s routed ones: the
/// shared heads [s] run with weight 1, and the relevance of the most relevant other head.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> share_heads(const at::Tensor& index,
                                                                       const at::Tensor& count,
                                                                       const at::Tensor& weight,
                                                                       const at::Tensor& relevance,
                                                                       const at::Tensor& shared);

}  // namespace headwise

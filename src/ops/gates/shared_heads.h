// Operators of the gates with shared heads or groups; torch.ops.headwise has them by the same
// names.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
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

/// {index, count, weight} over H heads from a selection among groups: a head runs if its group was
/// chosen, with the weight of the group. place: int64 [H], the group of each head.
std::tuple<at::Tensor, at::Tensor, at::Tensor> choose_group_heads(const at::Tensor& index,
                                                                  const at::Tensor& count,
                                                                  const at::Tensor& weight,
                                                                  const at::Tensor& place);

/// {chosen bool, weight, relevance} [.., H] of rows from the logits of a mixture's routers, by the
/// released code of MoH (Jin et al. 2024, arXiv 2410.11842): the `routed` routed heads of largest
/// softmax(router) with those values, normalised to a mean of 1; the shared heads [s] with s
/// softmax(shared_router), of mean 1 too; both kinds times 2 softmax(kind_router). relevance:
/// softmax(router), and for a shared head the largest of it; both double or float. Nothing is
/// chosen for rows of `padding`, bool [..].
/// @param router        floating [.., R]
/// @param shared_router floating [.., s]; none: 1 for the one shared head
/// @param kind_router   floating [.., 2], of shared and routed heads; none: 1 for both
std::tuple<at::Tensor, at::Tensor, at::Tensor> route_heads(
    const at::Tensor& router, const std::optional<at::Tensor>& shared_router,
    const std::optional<at::Tensor>& kind_router, const at::Tensor& shared, int64_t routed,
    const std::optional<at::Tensor>& padding);

/// The load balance loss [] of what route_heads returned: R sum_i f_i p_i over the R routed heads,
/// f_i the share of the rows that chose head i, p_i its mean relevance, padding left out.
at::Tensor routing_balance(const at::Tensor& relevance, const at::Tensor& chosen,
                           const at::Tensor& shared, const std::optional<at::Tensor>& padding);

}  // namespace headwise

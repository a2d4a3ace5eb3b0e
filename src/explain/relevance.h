// Why a gate chose as it did: operators on the gate's input; torch.ops.headwise has them by the
// same names. Each is exact algebra on the gates' own operators (src/ops/gates), never a second
// copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace headwise {

/// How much each token moves each head's relevance. The relevance is linear in the standardised
/// mean of the tokens, so with a_t the share of token t in that mean
///   relevance = constant + sum_t shares_t,  shares_t = a_t weight . standardize(x_t) / sqrt(D)
/// holds exactly. A token that looks like the average input has share 0, and `constant` is the
/// gate's `base`: the relevance of the average input. (A sequence of nothing but padding has no
/// shares: all of its relevance is constant.)
/// x [B, L, D], mask [B, L], base [H], weight [H, D], mean and variance [D]
/// -> {shares [B, H, L], constant [B, H]}
std::tuple<at::Tensor, at::Tensor> token_shares(const at::Tensor& x,
                                                const std::optional<at::Tensor>& key_padding_mask,
                                                const at::Tensor& base, const at::Tensor& weight,
                                                const at::Tensor& mean, const at::Tensor& variance);

/// Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of the budget that head_budget
/// asks for, before its bounds, along the straight line from the average input to this one, by
/// Gauss-Legendre quadrature with `steps` nodes; the attribution of a feature is divided among the
/// tokens that it is the mean of. By completeness the attributions sum to value - baseline, up to
/// the error of the quadrature.
/// -> {attribution [B, L], baseline [B]: the budget of the average input, value [B]}
std::tuple<at::Tensor, at::Tensor, at::Tensor> budget_attribution(
    const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask, const at::Tensor& mean,
    const at::Tensor& variance, const at::Tensor& hidden_weight, const at::Tensor& hidden_bias,
    const at::Tensor& out_weight, const at::Tensor& out_bias, const at::Tensor& progress,
    double keep, double initial_keep, double warmup, int64_t steps);

/// Rank of each head by relevance, 1 for the most relevant; ties go to the lower head, as in
/// select_heads. relevance [B, H] -> int64 [B, H]
at::Tensor relevance_rank(const at::Tensor& relevance);

/// How far the relevance of a chosen head is from being dropped (positive), or that of another head
/// from being chosen (negative): its distance from the best head on the other side; infinite if
/// there is none. relevance [B, H], chosen bool [B, H] -> [B, H]
at::Tensor selection_margin(const at::Tensor& relevance, const at::Tensor& chosen);

/// The smallest budget at which budget_count reaches each head: 0 for heads that always run.
/// rank int [B, H], 1 the first -> float64 [B, H]
at::Tensor budget_needed(const at::Tensor& rank, int64_t min_heads, std::string_view rounding);

}  // namespace headwise

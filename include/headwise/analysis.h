// Formulas of the analyses of heads: layer-wise relevance propagation, causal gates, prediction
// confidence.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include "headwise/export.h"

namespace headwise {

/// `value` = f(x) as if f were multiplication by a constant: its derivative is value / x (0 where x
/// is 0). Gradient times input then passes on all LRP relevance of an elementwise f with f(0) = 0.
/// @param x, value floating, of the same shape
HEADWISE_API at::Tensor held_slope(const at::Tensor& x, const at::Tensor& value);

/// Layer norm with its standard deviation and its weight held constant (the LN rule of Ali et al.
/// 2022, arXiv 2202.07304): linear in x and bias.
/// @param x floating [..., D]; weight, bias [D], may be undefined
HEADWISE_API at::Tensor held_layer_norm(const at::Tensor& x,
                                        const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias, double eps);

/// LRP relevance of a layer's heads: the sum over tokens and width of context * gradient, as shares
/// of the sum of its absolute values over the heads of the layer (zeros where that is 0).
/// @param context, gradient floating [B, H, L, d]
/// @returns float64 [B, H]
HEADWISE_API at::Tensor relevance_shares(const at::Tensor& context, const at::Tensor& gradient);

/// Regulariser of causal head gating (arXiv 2505.13737): -strength * sum clip(logits, -limit,
/// limit); strength > 0 opens gates that the loss does not need closed, < 0 closes those it does
/// not need open.
/// @param logits floating [T] @returns []
HEADWISE_API at::Tensor causal_penalty(const at::Tensor& logits, double strength, double limit);

/// What heads do, from their gates under strength > 0 (`raised`) and < 0 (`lowered`): facilitating
/// min(raised, lowered), interfering 1 - max(raised, lowered), irrelevant |raised - lowered|. The
/// three sum to 1.
/// @param raised, lowered floating [T], in [0, 1]
/// @returns facilitating, interfering, irrelevant: [T] each
HEADWISE_API std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_roles(const at::Tensor& raised,
                                                                         const at::Tensor& lowered);

/// The confidence of a prediction, in [0, 1].
/// @param logits floating [B, C], C >= 2
/// @param measure "probability": the largest softmax probability; "margin": the largest less the
///        second; "entropy": 1 - entropy / ln C
/// @returns [B]
HEADWISE_API at::Tensor prediction_confidence(const at::Tensor& logits, std::string_view measure);

/// The largest threshold under which examples that pass through S stages, and stop at the first
/// whose confidence reaches it, cost at most `limit` on average. Cost never falls as the threshold
/// rises.
/// @param confidence float64 [S - 1, N]: after each stage but the last, which is always final
/// @param cost float64 [S, N]: of each stage alone, not negative
/// @returns the threshold: one of the confidences, or infinity if no example needs to stop
/// @throws c10::ValueError if `limit` is below the mean cost of the first stage
HEADWISE_API double confidence_threshold(const at::Tensor& confidence, const at::Tensor& cost,
                                         double limit);

/// P(X <= successes) of a binomial X, exactly (sums of the mass, in logarithms).
/// @throws c10::ValueError if `trials` is not in 0..10,000,000 or `probability` not in [0, 1]
HEADWISE_API double binomial_tail(int64_t successes, int64_t trials, double probability);

/// The least threshold that keeps the accuracy of the widest stage.
///
/// With `certainty`: learn then test (Angelopoulos et al., arXiv 2110.01052), as CALM (Schuster et
/// al. 2022, arXiv 2207.07061) uses it. A fixed grid of thresholds is tested from infinity down;
/// each is accepted if P(Bin(N, loss) <= number of examples lost) <= 1 - certainty, and the last
/// one accepted is returned. An example is lost if the widest stage is right and the policy is not.
/// With probability `certainty` over the N examples, at most the share `loss` of all inputs is
/// lost, and so is the accuracy.
///
/// Without: of the confidences, the last one from infinity down with which these N examples lose at
/// most `loss` of their accuracy. This is no bound for other data.
/// @param confidence float64 [S - 1, N], as in confidence_threshold
/// @param correct bool [S, N]: whether each stage's prediction is right
/// @param loss the share of examples that may be lost, in [0, 1]
/// @param certainty in (0, 1)
/// @returns the threshold; infinity if no other was accepted
HEADWISE_API double accurate_threshold(const at::Tensor& confidence, const at::Tensor& correct,
                                       double loss, std::optional<double> certainty = {});

}  // namespace headwise

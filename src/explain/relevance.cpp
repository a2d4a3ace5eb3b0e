#include "explain/relevance.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <Eigen/Eigenvalues>
#include <cmath>
#include <limits>

#include "ops/gates/budget.h"
#include "ops/gates/selection_ops.h"
#include "shown.h"

namespace headwise {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// Share of each token in the mean that gates pool: [B, L]. The mean is linear in the tokens, so
/// its value on unit vectors is the share, whatever the mask.
at::Tensor pooling_shares(const at::Tensor& x, const OptionalTensor& key_padding_mask) {
  const auto unit = at::eye(x.size(1), x.options()).expand({x.size(0), x.size(1), x.size(1)});
  return masked_mean(unit, key_padding_mask);
}

/// Nodes and weights of Gauss-Legendre quadrature on [0, 1]: eigenvalues of the Jacobi matrix of
/// the Legendre polynomials, and squared first components of its eigenvectors (Golub and Welsch
/// 1969).
std::pair<at::Tensor, at::Tensor> gauss_legendre(int64_t steps) {
  Eigen::VectorXd diagonal = Eigen::VectorXd::Zero(steps), side(steps > 1 ? steps - 1 : 0);
  for (int64_t i = 1; i < steps; ++i) side[i - 1] = i / std::sqrt(4.0 * i * i - 1.0);
  Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver;
  solver.computeFromTridiagonal(diagonal, side);
  const auto nodes = at::empty({steps}, at::kDouble), weights = at::empty({steps}, at::kDouble);
  for (int64_t i = 0; i < steps; ++i) {
    nodes.mutable_data_ptr<double>()[i] = 0.5 * (solver.eigenvalues()[i] + 1.0);
    weights.mutable_data_ptr<double>()[i] = std::pow(solver.eigenvectors()(0, i), 2);
  }
  return {nodes, weights};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> token_shares(const at::Tensor& x,
                                                const OptionalTensor& key_padding_mask,
                                                const at::Tensor& base, const at::Tensor& weight,
                                                const at::Tensor& mean,
                                                const at::Tensor& variance) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have shape [B, L, D], got ", x.dim(), " dimensions");
  const auto wide = x.detach().to(at::kDouble);  // the gate's own rounding is then the only error
  const auto share = pooling_shares(wide, key_padding_mask);  // [B, L]
  const auto none = at::zeros({}, wide.options().dtype(at::kFloat));
  // The relevance, without its base, of standardised features [N, D]: [N, H].
  const auto moved = [&](const at::Tensor& features) {
    return input_relevance(standardize(features, mean, variance), at::zeros_like(base), weight,
                           none, false, 0.0);
  };
  const auto each = moved(wide.flatten(0, 1)).view({x.size(0), x.size(1), -1});  // [B, L, H]
  const auto shares = (each * share.unsqueeze(2)).transpose(1, 2);               // [B, H, L]
  // The shares of the pooling sum to one, except where everything is padding.
  const auto rest = 1 - share.sum(1, true);                               // [B, 1]
  const auto nothing = moved(at::zeros({1, x.size(2)}, wide.options()));  // [1, H]
  return {shares, base.to(nothing.scalar_type()).unsqueeze(0) + rest * nothing};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> budget_attribution(
    const at::Tensor& x, const OptionalTensor& key_padding_mask, const at::Tensor& mean,
    const at::Tensor& variance, const at::Tensor& hidden_weight, const at::Tensor& hidden_bias,
    const at::Tensor& out_weight, const at::Tensor& out_bias, const at::Tensor& progress,
    double keep, double initial_keep, double warmup, int64_t steps) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have shape [B, L, D], got ", x.dim(), " dimensions");
  constexpr int64_t kMostSteps = 1'024;  // nodes of a quadrature, found in their cube of time
  TORCH_CHECK_VALUE(steps > 0 && steps <= kMostSteps, "steps must be in 1..", kMostSteps, ", got ",
                    steps);
  // Float64: the completeness error is then the quadrature's alone.
  const auto wide = x.detach().to(at::kDouble);
  const auto asked = [&](const at::Tensor& features) {
    return std::get<1>(head_budget(features, hidden_weight.detach(), hidden_bias.detach(),
                                   out_weight.detach(), out_bias.detach(), progress, false, 0.0,
                                   1.0, keep, initial_keep, warmup, 0.0));
  };
  const auto features = standardize(masked_mean(wide, key_padding_mask), mean, variance);  // [B, D]
  const auto [nodes, weights] = gauss_legendre(steps);
  const auto options = features.options();
  at::Tensor slope;  // [B, D]: the gradient's mean along the line
  {
    at::AutoGradMode with_gradient(true);
    const auto along = (features.unsqueeze(0) * nodes.to(options).view({-1, 1, 1}))
                           .flatten(0, 1)
                           .detach()
                           .requires_grad_();  // [steps * B, D]
    const auto gradient = torch::autograd::grad({asked(along).sum()}, {along}).front();
    slope = (gradient.view({steps, x.size(0), -1}) * weights.to(options).view({-1, 1, 1})).sum(0);
  }
  const auto each = standardize(wide.flatten(0, 1), mean, variance).view(x.sizes());  // [B, L, D]
  const auto attribution = at::matmul(each, slope.unsqueeze(2)).squeeze(2) *
                           pooling_shares(wide, key_padding_mask);  // [B, L]
  return {attribution, asked(at::zeros_like(features)), asked(features)};
}

at::Tensor relevance_rank(const at::Tensor& relevance) {
  TORCH_CHECK_VALUE(relevance.dim() == 2, "relevance must have shape [B, H], got ", relevance.dim(),
                    " dimensions");
  const auto order = relevance.argsort(/*stable=*/true, 1, /*descending=*/true);  // [B, H]
  const auto place =
      at::arange(1, relevance.size(1) + 1, order.options()).expand_as(order).contiguous();
  return at::empty_like(order).scatter(1, order, place);
}

at::Tensor selection_margin(const at::Tensor& relevance, const at::Tensor& chosen) {
  TORCH_CHECK_VALUE(relevance.dim() == 2 && chosen.sizes() == relevance.sizes(),
                    "relevance and chosen must have the same shape [B, H], got ", relevance.sizes(),
                    " and ", chosen.sizes());
  if (relevance.size(1) == 0) return relevance;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto best_out = relevance.masked_fill(chosen, -infinity).amax(1, true);  // [B, 1]
  const auto last_in =
      relevance.masked_fill(chosen.logical_not(), infinity).amin(1, true);  // [B, 1]
  return relevance - at::where(chosen, best_out, last_in);
}

at::Tensor budget_needed(const at::Tensor& rank, int64_t min_heads, std::string_view rounding) {
  TORCH_CHECK_VALUE(rank.dim() == 2, "rank must have shape [B, H], got ", rank.dim(),
                    " dimensions");
  TORCH_CHECK_VALUE(rounding == "round" || rounding == "ceil",
                    "rounding must be round or ceil, got ", shown(rounding));
  // The inverse of budget_count: floor(s H + 1/2) >= r from s H = r - 1/2 on; ceil(s H - 1e-4) >= r
  // beyond s H = r - 1 + 1e-4.
  const double offset = rounding == "ceil" ? 1.0 - 1e-4 : 0.5;
  const auto needed =
      (rank.to(at::kDouble) - offset) / static_cast<double>(std::max<int64_t>(rank.size(1), 1));
  return needed.masked_fill(rank.le(min_heads), 0.0);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("token_shares", token_shares);
  m.impl("budget_attribution", budget_attribution);
  m.impl("relevance_rank", relevance_rank);
  m.impl("selection_margin", selection_margin);
  m.impl("budget_needed", budget_needed);
}

}  // namespace headwise

// Differentiable subset pruning (Li, Cotterell and Sachan 2021, arXiv 2108.04657): k heads of a
// model.
#include "ops/gates/subset.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "headwise/selection.h"

namespace headwise {
namespace {

void check_subset(const at::Tensor& scores, int64_t k) {
  TORCH_CHECK_VALUE(scores.dim() == 1, "scores must have shape [N], got ", scores.dim(),
                    " dimensions");
  TORCH_CHECK_VALUE(k >= 1 && k <= scores.size(0), "k must be in 1..", scores.size(0), ", got ", k);
}

}  // namespace

at::Tensor subset_sample(const at::Tensor& scores, int64_t k, const at::Tensor& temperature) {
  check_subset(scores, k);
  auto r = scores.to(at::kDouble);  // [N]
  if (k == scores.size(0)) {
    return at::ones_like(r) + (r - r.detach());
  }
  const auto tau = temperature.detach().to(at::kDouble);
  // A step of the recursion multiplies the gradient by at most 1 + 2 / tau, so k steps at a low
  // temperature overflow where heads tie, and inf - inf is not a number. The gradient of ln(1 - p)
  // is scaled down to what keeps the product under 1e250; with few heads this never happens.
  const double reach = (std::pow(10.0, 250.0 / static_cast<double>(k)) - 1.0) / 2.0;
  const auto share = (tau * reach).clamp_max(1.0);
  // The floor of the authors' code. A head that was taken whole must fall below all others even if
  // scores differ by more than its logarithm, 708; else it would be taken k times.
  constexpr double kTiny = std::numeric_limits<double>::min();
  const auto spread = (r.amax() - r.amin()).detach();
  at::Tensor total;
  for (int64_t j = 0; j < k; ++j) {
    const auto p = at::softmax(r / tau, 0);  // [N]
    total = j == 0 ? p : total + p;
    if (j + 1 < k) {
      const auto rest = 1.0 - p;
      const auto left = at::log(rest.clamp_min(kTiny)) - rest.detach().eq(0.0) * spread;
      r = r + left.detach() + share * (left - left.detach());
    }
  }
  return total;
}

at::Tensor subset_weight(const at::Tensor& scores, const std::optional<at::Tensor>& noise,
                         const at::Tensor& progress, int64_t k, bool training, double temperature,
                         double final_temperature, double cooled_at, double hard_from) {
  check_subset(scores, k);
  const auto w = scores.to(at::kDouble);
  const auto row = w.detach().unsqueeze(0);  // [1, N]
  const auto count = at::full({1}, k, row.options().dtype(at::kInt));
  auto hard = selection_mask(select_heads(row, count), count, at::kDouble).squeeze(0);  // [N]
  if (!training) {
    return hard;
  }
  auto through = hard + (w - w.detach());
  if (!noise) {
    return through;
  }
  const auto p = progress.detach().to(at::kDouble);
  const auto cooled = cooled_at > 0 ? (p / cooled_at).clamp(0.0, 1.0) : at::ones_like(p);
  const auto tau =
      at::exp(std::log(temperature) + cooled * std::log(final_temperature / temperature));
  const auto soft = subset_sample(w + noise->to(at::kDouble), k, tau);
  return at::where(progress.detach().ge(hard_from), through, soft);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("subset_sample", subset_sample);
  m.impl("subset_weight", subset_weight);
}

}  // namespace headwise

#include <ATen/ATen.h>
#include <torch/library.h>

#include <Eigen/Core>

#include "bootstrap/resample.h"
#include "headwise/bootstrap.h"

namespace headwise {

using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> paired_bootstrap(
    const at::Tensor& differences, int64_t resamples, int64_t seed, double confidence_level) {
  TORCH_CHECK_VALUE(differences.dim() == 2 && differences.size(1) > 0,
                    "differences must be [M, N] of at least one example, got ",
                    differences.sizes());
  analysis::check_resampling(resamples, confidence_level);
  const at::Tensor values = differences.detach().to(at::kCPU, at::kDouble).contiguous();
  TORCH_CHECK_VALUE(at::isfinite(values).all().item<bool>(),
                    "differences must be finite, got NaN or infinity");
  const int64_t rows = values.size(0), examples = values.size(1);
  const Eigen::Map<const RowMajor> data(values.const_data_ptr<double>(), rows, examples);

  // means(m, r): of row m in resample r. Counting the draws first makes a resample one product.
  Eigen::MatrixXd means(rows, resamples);
  Eigen::VectorXd counts(examples);
  analysis::Draw draw(seed);
  for (int64_t r = 0; r < resamples; ++r) {
    counts.setZero();
    for (int64_t i = 0; i < examples; ++i) counts[draw(examples)] += 1.0;
    means.col(r).noalias() = data * counts / static_cast<double>(examples);
  }

  const at::Tensor mean = values.mean(1);
  at::Tensor low = at::empty_like(mean), high = at::empty_like(mean), p = at::empty_like(mean);
  std::vector<double> sorted(resamples);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t r = 0; r < resamples; ++r) sorted[r] = means(m, r);
    std::sort(sorted.begin(), sorted.end());
    low.mutable_data_ptr<double>()[m] = analysis::quantile(sorted, (1 - confidence_level) / 2);
    high.mutable_data_ptr<double>()[m] = analysis::quantile(sorted, (1 + confidence_level) / 2);
    const auto not_above = std::upper_bound(sorted.begin(), sorted.end(), 0.0) - sorted.begin();
    const auto below = std::lower_bound(sorted.begin(), sorted.end(), 0.0) - sorted.begin();
    const auto fewer = static_cast<double>(std::min<int64_t>(not_above, resamples - below));
    p.mutable_data_ptr<double>()[m] =
        std::min(1.0, 2.0 * (1.0 + fewer) / (1.0 + static_cast<double>(resamples)));
  }
  return {mean, low, high, p};
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("paired_bootstrap", paired_bootstrap); }

}  // namespace headwise

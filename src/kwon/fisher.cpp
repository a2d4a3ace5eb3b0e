#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <Eigen/Core>
#include <algorithm>
#include <numeric>

#include "headwise/kwon.h"
#include "shown.h"

namespace headwise {

using RowMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

void FisherAccumulator::add(const std::string& layer, const at::Tensor& gradient) {
  TORCH_CHECK_VALUE(gradient.dim() == 1, "gradient of ", layer_called(layer),
                    " must have one number per unit, got shape ", gradient.sizes());
  const at::Tensor host = gradient.detach().to(at::kCPU, at::kDouble).contiguous();  // [U]
  TORCH_CHECK_VALUE(at::isfinite(host).all().item<bool>(), "gradient of ", layer_called(layer),
                    " must be finite, got NaN or infinity: is the loss?");
  auto& rows = rows_[layer];
  TORCH_CHECK_VALUE(rows.empty() || static_cast<int64_t>(rows.front().size()) == host.numel(),
                    "gradient of ", layer_called(layer), " must have ",
                    rows.empty() ? 0 : rows.front().size(), " units, got ", host.numel());
  const double* values = host.const_data_ptr<double>();
  rows.emplace_back(values, values + host.numel());
}

at::Tensor FisherAccumulator::gradients(const std::string& layer) const {
  const auto found = rows_.find(layer);
  TORCH_CHECK_INDEX(found != rows_.end(), "nothing was added for ", layer_called(layer));
  const auto& rows = found->second;
  at::Tensor all = at::empty(
      {static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows.front().size())}, at::kDouble);
  double* out = all.mutable_data_ptr<double>();
  for (const auto& row : rows) out = std::copy(row.begin(), row.end(), out);
  return all;
}

std::vector<double> FisherAccumulator::scores(const std::string& layer) const {
  const auto found = rows_.find(layer);
  TORCH_CHECK_INDEX(found != rows_.end(), "nothing was added for ", layer_called(layer));
  std::vector<double> sums(found->second.front().size(), 0.0);
  for (const auto& row : found->second) {
    for (size_t i = 0; i < row.size(); ++i) sums[i] += row[i] * row[i];
  }
  return sums;
}

std::vector<int64_t> rearrange(const at::Tensor& gradients, const std::vector<int64_t>& kept) {
  TORCH_CHECK_VALUE(gradients.dim() == 2, "gradients must have shape [batches, units], got ",
                    gradients.sizes());
  const at::Tensor host = gradients.to(at::kCPU, at::kDouble).contiguous();
  const int64_t batches = host.size(0), units = host.size(1);
  const Eigen::Map<const RowMatrix> g(host.const_data_ptr<double>(), batches, units);
  std::vector<bool> stays(units, false);
  for (const int64_t unit : kept) {
    TORCH_CHECK_VALUE(unit >= 0 && unit < units, "kept must be between 0 and ", units - 1, ", got ",
                      unit);
    stays[unit] = true;
  }
  const auto going_count = units - std::count(stays.begin(), stays.end(), true);
  if (going_count == 0 || going_count == units) return kept;

  const Eigen::VectorXd squared = g.colwise().squaredNorm();  // [U]
  // The pruned units, column by column, and room for the one that joins them.
  std::vector<int64_t> going;
  Eigen::MatrixXd columns(batches, going_count + 1);
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(batches);
  for (int64_t unit = 0; unit < units; ++unit) {
    if (stays[unit]) continue;
    columns.col(static_cast<int64_t>(going.size())) = g.col(unit);
    sum += g.col(unit);
    going.push_back(unit);
  }
  std::vector<int64_t> candidates(kept);
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](int64_t a, int64_t b) { return squared[a] < squared[b]; });
  going.push_back(-1);
  for (const int64_t candidate : candidates) {
    going.back() = candidate;
    columns.col(going_count) = g.col(candidate);
    const Eigen::VectorXd joined = sum + g.col(candidate);
    // |joined - g_j|^2 = |joined|^2 - 2 joined g_j + |g_j|^2
    const Eigen::VectorXd overlap = columns.transpose() * joined;
    int64_t leaves = going_count;  // ties: the candidate itself returns
    double least = squared[candidate] - 2 * overlap[going_count];
    for (int64_t j = 0; j < going_count; ++j) {
      const double value = squared[going[j]] - 2 * overlap[j];
      // Beyond rounding, or the norm could grow.
      if (value < least - 1e-12 * (joined.squaredNorm() + std::abs(least))) {
        least = value;
        leaves = j;
      }
    }
    sum = joined - columns.col(leaves);
    going[leaves] = candidate;
    columns.col(leaves) = g.col(candidate);
  }
  going.pop_back();
  std::fill(stays.begin(), stays.end(), true);
  for (const int64_t unit : going) stays[unit] = false;
  std::vector<int64_t> result;
  for (int64_t unit = 0; unit < units; ++unit) {
    if (stays[unit]) result.push_back(unit);
  }
  return result;
}

}  // namespace headwise

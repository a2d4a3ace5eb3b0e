#include "explain/use_statistics.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "bootstrap/resample.h"

namespace headwise {
namespace {

using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Matrix = Eigen::Map<const RowMajor>;
using Vector = Eigen::Map<Eigen::VectorXd>;

at::Tensor on_host(const at::Tensor& t) {
  return t.detach().to(at::kCPU, at::kDouble).contiguous();
}

Matrix matrix(const at::Tensor& t) { return {t.const_data_ptr<double>(), t.size(0), t.size(1)}; }

Vector vector(const at::Tensor& t) { return {t.mutable_data_ptr<double>(), t.numel()}; }

at::Tensor empty(int64_t size) { return at::empty({size}, at::kDouble); }

void check_chosen(const at::Tensor& chosen) {
  TORCH_CHECK_VALUE(chosen.dim() == 2 && chosen.size(0) > 0,
                    "chosen must be [N, M] of at least one input, got ", chosen.sizes());
}

/// Fisher-Yates: `order` in a random order.
void shuffle(std::vector<int64_t>& order, analysis::Draw& draw) {
  for (auto i = static_cast<int64_t>(order.size()) - 1; i > 0; --i) {
    std::swap(order[i], order[draw(i + 1)]);
  }
}

double log_term(double joint, double first, double second) {
  return joint > 0 ? joint * std::log2(joint / (first * second)) : 0.0;
}

/// Bits, of counts(c, m): inputs of class c that chose head m.
Eigen::VectorXd information(const Eigen::MatrixXd& counts, const Eigen::VectorXd& of_class) {
  const double total = of_class.sum();
  const Eigen::VectorXd rate = counts.colwise().sum().transpose() / total;
  Eigen::VectorXd bits = Eigen::VectorXd::Zero(counts.cols());
  for (Eigen::Index m = 0; m < counts.cols(); ++m) {
    for (Eigen::Index c = 0; c < counts.rows(); ++c) {
      const double share = of_class[c] / total, joint = counts(c, m) / total;
      bits[m] += log_term(joint, share, rate[m]) + log_term(share - joint, share, 1.0 - rate[m]);
    }
  }
  return bits.cwiseMax(0.0);  // rounding
}

/// Average ranks, 1 to N.
std::vector<double> ranks(const double* values, int64_t size) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  std::vector<double> rank(size);
  for (int64_t i = 0; i < size;) {
    int64_t end = i;
    while (end < size && values[order[end]] == values[order[i]]) ++end;
    for (int64_t n = i; n < end; ++n) rank[order[n]] = 0.5 * static_cast<double>(i + end + 1);
    i = end;
  }
  return rank;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> share_interval(const at::Tensor& hits,
                                                              const at::Tensor& trials,
                                                              int64_t resamples, int64_t seed,
                                                              double confidence_level) {
  TORCH_CHECK_VALUE(hits.dim() == 2 && hits.size(0) > 0 && trials.sizes() == hits.sizes(),
                    "hits and trials must have the same shape [N, M], N > 0, got ", hits.sizes(),
                    " and ", trials.sizes());
  analysis::check_resampling(resamples, confidence_level);
  const auto h = on_host(hits), t = on_host(trials);
  const int64_t clusters = h.size(0), columns = h.size(1);
  Eigen::MatrixXd shares(columns, resamples);
  Eigen::VectorXd counts(clusters);
  analysis::Draw draw(seed);
  for (int64_t r = 0; r < resamples; ++r) {
    counts.setZero();
    for (int64_t i = 0; i < clusters; ++i) counts[draw(clusters)] += 1.0;
    shares.col(r) = (matrix(h).transpose() * counts).cwiseQuotient(matrix(t).transpose() * counts);
  }
  const at::Tensor share = h.sum(0) / t.sum(0);  // [M]
  at::Tensor low = empty(columns), high = empty(columns);
  std::vector<double> sorted;
  for (int64_t m = 0; m < columns; ++m) {
    sorted.clear();  // a resample without a trial of this column has no share
    for (int64_t r = 0; r < resamples; ++r) {
      if (!std::isnan(shares(m, r))) sorted.push_back(shares(m, r));
    }
    std::sort(sorted.begin(), sorted.end());
    const bool known = !sorted.empty();
    vector(low)[m] = known ? analysis::quantile(sorted, (1 - confidence_level) / 2) : NAN;
    vector(high)[m] = known ? analysis::quantile(sorted, (1 + confidence_level) / 2) : NAN;
  }
  return {share, low, high};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> selection_information(const at::Tensor& chosen,
                                                                     const at::Tensor& label,
                                                                     int64_t classes,
                                                                     int64_t permutations,
                                                                     int64_t seed) {
  check_chosen(chosen);
  analysis::check_draws(permutations, "permutations");
  constexpr int64_t kMostClasses = 65'536;
  TORCH_CHECK_VALUE(classes >= 0 && classes <= kMostClasses, "classes must be in 0..", kMostClasses,
                    ", got ", classes);
  TORCH_CHECK_VALUE(label.dim() == 1 && label.size(0) == chosen.size(0), "label must be [",
                    chosen.size(0), "], got ", label.sizes());
  const auto c = on_host(chosen);
  const auto l = label.to(at::kCPU, at::kLong).contiguous();
  const int64_t inputs = c.size(0), heads = c.size(1);
  const int64_t* of = l.const_data_ptr<int64_t>();
  Eigen::VectorXd sizes = Eigen::VectorXd::Zero(classes);
  for (int64_t i = 0; i < inputs; ++i) {
    TORCH_CHECK_VALUE(of[i] >= 0 && of[i] < classes, "label must be in 0..", classes - 1, ", got ",
                      of[i]);
    sizes[of[i]] += 1.0;
  }
  std::vector<int64_t> order(inputs);
  std::iota(order.begin(), order.end(), 0);
  const auto measure = [&] {
    Eigen::MatrixXd counts = Eigen::MatrixXd::Zero(classes, heads);
    for (int64_t i = 0; i < inputs; ++i) counts.row(of[order[i]]) += matrix(c).row(i);
    return information(counts, sizes);
  };
  const Eigen::VectorXd observed = measure();
  Eigen::VectorXd reached = Eigen::VectorXd::Zero(heads), sum = Eigen::VectorXd::Zero(heads);
  analysis::Draw draw(seed);
  for (int64_t r = 0; r < permutations; ++r) {
    shuffle(order, draw);
    const Eigen::VectorXd shuffled = measure();
    sum += shuffled;
    reached += (shuffled.array() >= observed.array() - 1e-12).cast<double>().matrix();
  }
  at::Tensor bits = empty(heads), chance = empty(heads), p = empty(heads);
  vector(bits) = observed;
  vector(chance) = sum / static_cast<double>(permutations);
  vector(p) = ((reached.array() + 1.0) / (1.0 + static_cast<double>(permutations))).matrix();
  return {bits, chance, p};
}

std::tuple<at::Tensor, at::Tensor> selection_association(const at::Tensor& chosen,
                                                         const at::Tensor& value,
                                                         int64_t permutations, int64_t seed) {
  check_chosen(chosen);
  analysis::check_draws(permutations, "permutations");
  TORCH_CHECK_VALUE(value.dim() == 1 && value.size(0) == chosen.size(0), "value must be [",
                    chosen.size(0), "], got ", value.sizes());
  const auto c = on_host(chosen), v = on_host(value);
  TORCH_CHECK_VALUE(at::isfinite(v).all().item<bool>(),
                    "value must be finite, got NaN or infinity");
  const int64_t inputs = c.size(0), heads = c.size(1);
  auto rank = ranks(v.const_data_ptr<double>(), inputs);
  // With n chosen of N, P(higher) - P(lower) = 2 (mean rank of the chosen - (N + 1) / 2) / (N - n).
  const Eigen::VectorXd taken = matrix(c).colwise().sum().transpose();
  const Eigen::ArrayXd left = static_cast<double>(inputs) - taken.array();
  const Eigen::Array<bool, Eigen::Dynamic, 1> usable = taken.array() > 0.0 && left > 0.0;
  const auto measure = [&](const std::vector<double>& r) -> Eigen::ArrayXd {
    const Eigen::Map<const Eigen::VectorXd> given(r.data(), inputs);
    const Eigen::ArrayXd mean = (matrix(c).transpose() * given).array() / taken.array();
    const Eigen::ArrayXd found = 2.0 * (mean - 0.5 * static_cast<double>(inputs + 1)) / left;
    return usable.select(found, 0.0);
  };
  const Eigen::ArrayXd observed = measure(rank);
  Eigen::ArrayXd reached = Eigen::ArrayXd::Zero(heads);
  std::vector<int64_t> order(inputs);
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> shuffled(inputs);
  analysis::Draw draw(seed);
  for (int64_t r = 0; r < permutations; ++r) {
    shuffle(order, draw);
    for (int64_t i = 0; i < inputs; ++i) shuffled[i] = rank[order[i]];
    reached += (measure(shuffled).abs() >= observed.abs() - 1e-12).cast<double>();
  }
  at::Tensor correlation = empty(heads), p = empty(heads);
  vector(correlation) = observed.matrix();
  vector(p) = ((reached + 1.0) / (1.0 + static_cast<double>(permutations))).matrix();
  return {correlation, p};
}

at::Tensor false_discovery_rate(const at::Tensor& p) {
  TORCH_CHECK_VALUE(p.dim() == 1, "p must have shape [M], got ", p.sizes());
  const auto given = on_host(p);
  const double* values = given.const_data_ptr<double>();
  std::vector<int64_t> order;
  for (int64_t i = 0; i < given.numel(); ++i) {
    if (!std::isnan(values[i])) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  at::Tensor adjusted = at::full_like(given, NAN);
  double smallest = 1.0;
  for (size_t place = order.size(); place-- > 0;) {
    const double scaled =
        values[order[place]] * static_cast<double>(order.size()) / static_cast<double>(place + 1);
    smallest = std::min(smallest, scaled);
    vector(adjusted)[order[place]] = smallest;
  }
  return adjusted;
}

at::Tensor co_selection(const at::Tensor& chosen) {
  check_chosen(chosen);
  const auto c = on_host(chosen);
  const auto centred = c - c.mean(0);                             // [N, M]
  const auto covariance = at::matmul(centred.t(), centred);       // [M, M]
  const auto spread = covariance.diagonal().clamp_min(0).sqrt();  // [M]
  const auto scale = spread.unsqueeze(0) * spread.unsqueeze(1);
  return at::where(scale.gt(1e-12), covariance / scale, 0.0).clamp(-1.0, 1.0);
}

at::Tensor selection_overlap(const at::Tensor& first, const at::Tensor& second) {
  TORCH_CHECK_VALUE(first.dim() == 2 && second.sizes() == first.sizes(),
                    "first and second must have the same shape [N, M], got ", first.sizes(),
                    " and ", second.sizes());
  const auto a = on_host(first).ne(0), b = on_host(second).ne(0);
  const auto both = a.logical_and(b).sum(1).to(at::kDouble);
  const auto either = a.logical_or(b).sum(1).to(at::kDouble);
  return at::where(either.gt(0), both / either.clamp_min(1.0), 1.0);
}

at::Tensor area_between(const at::Tensor& x, const at::Tensor& first, const at::Tensor& other) {
  TORCH_CHECK_VALUE(
      x.dim() == 1 && x.size(0) >= 2 && first.sizes() == x.sizes() && other.sizes() == x.sizes(),
      "x, first and other must be [K] of at least two points, got ", x.sizes(), ", ", first.sizes(),
      " and ", other.sizes());
  const auto along = on_host(x);
  TORCH_CHECK_VALUE(along.diff().gt(0).all().item<bool>(), "x must be ascending");
  const auto height = on_host(other) - on_host(first);
  return at::trapezoid(height, along, 0) / (along[-1] - along[0]);
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("share_interval", share_interval);
  m.impl("selection_information", selection_information);
  m.impl("selection_association", selection_association);
  m.impl("false_discovery_rate", false_discovery_rate);
  m.impl("co_selection", co_selection);
  m.impl("selection_overlap", selection_overlap);
  m.impl("area_between", area_between);
}

}  // namespace headwise

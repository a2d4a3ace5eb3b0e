#include <ATen/ATen.h>
#include <torch/library.h>

#include <numeric>
#include <optional>

#include "bootstrap/resample.h"
#include "headwise/bootstrap.h"
#include "shown.h"

namespace headwise {
namespace {

using Values = std::vector<double>;

std::vector<size_t> order_of(const Values& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  return order;
}

/// Ranks from 1; equal values share the mean of theirs.
Values average_ranks(const Values& values) {
  const std::vector<size_t> order = order_of(values);
  Values ranks(values.size());
  for (size_t start = 0; start < order.size();) {
    size_t end = start + 1;
    while (end < order.size() && values[order[end]] == values[order[start]]) ++end;
    for (size_t i = start; i < end; ++i) {
      ranks[order[i]] = (static_cast<double>(start + end) + 1.0) / 2.0;
    }
    start = end;
  }
  return ranks;
}

/// Nothing where one of the two is constant.
std::optional<double> pearson(const Values& a, const Values& b) {
  const double n = static_cast<double>(a.size());
  const double mean_a = std::accumulate(a.begin(), a.end(), 0.0) / n;
  const double mean_b = std::accumulate(b.begin(), b.end(), 0.0) / n;
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += (a[i] - mean_a) * (b[i] - mean_b);
    aa += (a[i] - mean_a) * (a[i] - mean_a);
    bb += (b[i] - mean_b) * (b[i] - mean_b);
  }
  if (aa == 0 || bb == 0) return std::nullopt;
  return std::clamp(ab / std::sqrt(aa * bb), -1.0, 1.0);
}

/// Pairs of equal neighbours of sorted values.
template <typename Equal>
double tied_pairs(size_t size, Equal equal) {
  double pairs = 0, run = 1;
  for (size_t i = 1; i <= size; ++i) {
    if (i < size && equal(i - 1, i)) {
      run += 1;
    } else {
      pairs += run * (run - 1) / 2;
      run = 1;
    }
  }
  return pairs;
}

/// Sorts values and returns how many pairs were out of order (merge sort).
double sort_counting_swaps(Values& values, Values& scratch, size_t begin, size_t end) {
  if (end - begin < 2) return 0;
  const size_t middle = begin + (end - begin) / 2;
  double swaps = sort_counting_swaps(values, scratch, begin, middle) +
                 sort_counting_swaps(values, scratch, middle, end);
  size_t left = begin, right = middle;
  for (size_t out = begin; out < end; ++out) {
    if (left < middle && (right == end || values[left] <= values[right])) {
      scratch[out] = values[left++];
    } else {
      swaps += static_cast<double>(middle - left);
      scratch[out] = values[right++];
    }
  }
  std::copy(scratch.begin() + begin, scratch.begin() + end, values.begin() + begin);
  return swaps;
}

/// tau-b in O(N log N) (Knight, JASA 1966). Nothing where one of the two is constant.
std::optional<double> kendall(const Values& a, const Values& b) {
  const size_t size = a.size();
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t i, size_t j) { return a[i] != a[j] ? a[i] < a[j] : b[i] < b[j]; });
  Values sorted(size), scratch(size);
  for (size_t i = 0; i < size; ++i) sorted[i] = b[order[i]];
  const double ties_a =
      tied_pairs(size, [&](size_t i, size_t j) { return a[order[i]] == a[order[j]]; });
  const double ties_both = tied_pairs(size, [&](size_t i, size_t j) {
    return a[order[i]] == a[order[j]] && sorted[i] == sorted[j];
  });
  const double discordant = sort_counting_swaps(sorted, scratch, 0, size);
  const double ties_b =
      tied_pairs(size, [&](size_t i, size_t j) { return sorted[i] == sorted[j]; });
  const double pairs = static_cast<double>(size) * (static_cast<double>(size) - 1) / 2;
  if (ties_a == pairs || ties_b == pairs) return std::nullopt;
  // concordant - discordant, where pairs = concordant + discordant + ties in either
  const double balance = pairs - ties_a - ties_b + ties_both - 2 * discordant;
  return std::clamp(balance / std::sqrt((pairs - ties_a) * (pairs - ties_b)), -1.0, 1.0);
}

std::optional<double> correlation(const Values& a, const Values& b, bool spearman) {
  return spearman ? pearson(average_ranks(a), average_ranks(b)) : kendall(a, b);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> rank_agreement(const at::Tensor& scores,
                                                              std::string_view method,
                                                              int64_t resamples, int64_t seed,
                                                              double confidence_level) {
  TORCH_CHECK_VALUE(scores.dim() == 2 && scores.size(1) >= 2,
                    "scores must be [S, N] of at least 2 heads, got ", scores.sizes());
  TORCH_CHECK_VALUE(method == "spearman" || method == "kendall",
                    "method must be 'spearman' or 'kendall', got ", shown(method, 100, '\''));
  analysis::check_resampling(resamples, confidence_level);
  const at::Tensor host = scores.detach().to(at::kCPU, at::kDouble).contiguous();
  TORCH_CHECK_VALUE(at::isfinite(host).all().item<bool>(),
                    "scores must be finite, got NaN or infinity");
  const int64_t count = host.size(0), heads = host.size(1);
  std::vector<Values> rows(count);
  for (int64_t s = 0; s < count; ++s) {
    const double* row = host.const_data_ptr<double>() + s * heads;
    rows[s].assign(row, row + heads);
    TORCH_CHECK_VALUE(std::any_of(row, row + heads, [&](double v) { return v != row[0]; }),
                      "scores must not be all the same, which ranks nothing, got ", row[0],
                      " for every head in row ", s);
  }

  const bool spearman = method == "spearman";
  const int64_t pairs = count * (count - 1) / 2;
  std::vector<Values> sampled(pairs);
  std::vector<Values> drawn(count, Values(heads));
  analysis::Draw draw(seed);
  for (int64_t r = 0; r < resamples && pairs > 0; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t from = draw(heads);
      for (int64_t s = 0; s < count; ++s) drawn[s][h] = rows[s][from];
    }
    int64_t pair = 0;
    for (int64_t a = 0; a < count; ++a) {
      for (int64_t b = a + 1; b < count; ++b, ++pair) {
        if (const auto value = correlation(drawn[a], drawn[b], spearman)) {
          sampled[pair].push_back(*value);
        }
      }
    }
  }

  at::Tensor value = at::eye(count, host.options()), low = value.clone(), high = value.clone();
  auto v = value.accessor<double, 2>(), l = low.accessor<double, 2>(),
       h = high.accessor<double, 2>();
  int64_t pair = 0;
  for (int64_t a = 0; a < count; ++a) {
    for (int64_t b = a + 1; b < count; ++b, ++pair) {
      v[a][b] = v[b][a] = *correlation(rows[a], rows[b], spearman);
      auto& seen = sampled[pair];
      if (seen.empty()) seen.push_back(v[a][b]);
      std::sort(seen.begin(), seen.end());
      l[a][b] = l[b][a] = analysis::quantile(seen, (1 - confidence_level) / 2);
      h[a][b] = h[b][a] = analysis::quantile(seen, (1 + confidence_level) / 2);
    }
  }
  return {value, low, high};
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("rank_agreement", [](const at::Tensor& scores, c10::string_view method, int64_t resamples,
                              int64_t seed, double confidence_level) {
    return rank_agreement(scores, std::string_view(method.data(), method.size()), resamples, seed,
                          confidence_level);
  });
}

}  // namespace headwise

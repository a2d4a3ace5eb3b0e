#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "headwise/kwon.h"

namespace headwise {
namespace {

struct Ranked {
  double score;
  size_t layer;
  int64_t unit;
};

void check_scores(const UnitScores& heads, const UnitScores& neurons) {
  double sum = 0;
  for (const auto* scores : {&heads, &neurons}) {
    for (size_t layer = 0; layer < scores->size(); ++layer) {
      for (const double score : (*scores)[layer]) {
        TORCH_CHECK_VALUE(std::isfinite(score) && score >= 0, "scores of ",
                          scores == &heads ? "heads" : "neurons", " of layer ", layer,
                          " must be finite and not negative, got ", score);
        sum += score;
      }
    }
  }
  TORCH_CHECK_VALUE(sum > 0, "scores must not all be 0: the loss does not depend on the units");
}

/// Most important first; ties by layer, then unit.
std::vector<Ranked> ranked(const UnitScores& scores) {
  std::vector<Ranked> all;
  for (size_t layer = 0; layer < scores.size(); ++layer) {
    for (size_t unit = 0; unit < scores[layer].size(); ++unit) {
      all.push_back({scores[layer][unit], layer, static_cast<int64_t>(unit)});
    }
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Ranked& a, const Ranked& b) { return a.score > b.score; });
  return all;
}

/// The first `free` units of each layer go to the front of `units`; they are `count` of them.
size_t free_first(std::vector<Ranked>& units, size_t layers, int64_t free) {
  std::vector<int64_t> taken(layers, 0);
  const auto middle = std::stable_partition(
      units.begin(), units.end(), [&](const Ranked& unit) { return taken[unit.layer]++ < free; });
  return static_cast<size_t>(middle - units.begin());
}

/// Sums of the first 0, 1, ... scores.
std::vector<double> prefix_sums(const std::vector<Ranked>& units) {
  std::vector<double> sums(units.size() + 1, 0.0);
  for (size_t i = 0; i < units.size(); ++i) sums[i + 1] = sums[i] + units[i].score;
  return sums;
}

UnitIndices by_layer(const std::vector<Ranked>& units, size_t count, size_t layers) {
  UnitIndices kept(layers);
  for (size_t i = 0; i < count; ++i) kept[units[i].layer].push_back(units[i].unit);
  for (auto& layer : kept) std::sort(layer.begin(), layer.end());
  return kept;
}

/// The most units of at most `most` that a limit pays for.
size_t affordable(double limit, double cost, size_t most) {
  if (limit < 0) return 0;
  if (cost <= 0 || limit >= cost * static_cast<double>(most)) return most;
  auto count = static_cast<size_t>(limit / cost);
  // A quotient that rounding put just below a whole number.
  if (cost * static_cast<double>(count + 1) <= limit) ++count;
  while (count > 0 && cost * static_cast<double>(count) > limit) --count;
  return std::min(count, most);
}

/// Both searches: the first `free_*` units cost nothing beyond `base`.
KeptUnits search(const UnitScores& heads, const UnitScores& neurons, std::vector<Ranked> head_rank,
                 size_t free_heads, double head_cost, std::vector<Ranked> neuron_rank,
                 size_t free_neurons, double neuron_cost, double base, double limit) {
  const auto head_sums = prefix_sums(head_rank), neuron_sums = prefix_sums(neuron_rank);
  const double slack = 1e-12 * std::max(limit, 0.0);  // of sums that rounding put above the limit
  size_t best_heads = free_heads, best_neurons = free_neurons;
  double best = -1.0;
  for (size_t count = free_heads; count <= head_rank.size(); ++count) {
    // The limit of this round alone: what one round spends, the next must not miss.
    const double spent = base + head_cost * static_cast<double>(count - free_heads);
    const double left = limit - spent;
    if (left < -slack) break;
    const size_t more =
        affordable(std::max(left, 0.0) + slack, neuron_cost, neuron_rank.size() - free_neurons);
    const double score = head_sums[count] + neuron_sums[free_neurons + more];
    if (score > best) best = score, best_heads = count, best_neurons = free_neurons + more;
  }
  KeptUnits kept;
  kept.heads = by_layer(head_rank, best_heads, heads.size());
  kept.neurons = by_layer(neuron_rank, best_neurons, neurons.size());
  kept.score = std::max(best, 0.0);
  kept.cost = base + head_cost * static_cast<double>(best_heads - free_heads) +
              neuron_cost * static_cast<double>(best_neurons - free_neurons);
  return kept;
}

}  // namespace

KeptUnits search_macs(const UnitScores& heads, const UnitScores& neurons, double head_cost,
                      double neuron_cost, double limit) {
  check_scores(heads, neurons);
  TORCH_CHECK_VALUE(head_cost > 0 && neuron_cost > 0,
                    "head_cost and neuron_cost must be positive, ", "got ", head_cost, " and ",
                    neuron_cost);
  TORCH_CHECK_VALUE(limit >= 0, "limit must not be negative, got ", limit);
  return search(heads, neurons, ranked(heads), 0, head_cost, ranked(neurons), 0, neuron_cost, 0.0,
                limit);
}

double LatencyFit::seconds(int64_t units) const {
  return base + slope * static_cast<double>(std::max<int64_t>(units - threshold, 0));
}

LatencyFit fit_latency(const std::vector<int64_t>& units, const std::vector<double>& seconds) {
  TORCH_CHECK_VALUE(units.size() >= 2 && units.size() == seconds.size(),
                    "units and seconds must be of one length, at least 2, got ", units.size(),
                    " and ", seconds.size());
  for (size_t i = 0; i < units.size(); ++i) {
    TORCH_CHECK_VALUE(i == 0 ? units[i] >= 0 : units[i] > units[i - 1],
                      "units must be ascending, different and not negative, got ", units[i]);
    TORCH_CHECK_VALUE(std::isfinite(seconds[i]) && seconds[i] > 0,
                      "seconds must be positive and finite, got ", seconds[i]);
  }
  const auto count = static_cast<double>(units.size());
  const double mean_y = std::accumulate(seconds.begin(), seconds.end(), 0.0) / count;
  LatencyFit best;
  double best_error = std::numeric_limits<double>::infinity();
  for (const int64_t threshold : units) {
    // Linear regression on the units beyond the threshold.
    std::vector<double> x;
    for (const int64_t unit : units) {
      x.push_back(static_cast<double>(std::max<int64_t>(unit - threshold, 0)));
    }
    const double mean_x = std::accumulate(x.begin(), x.end(), 0.0) / count;
    double xx = 0, xy = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      xx += (x[i] - mean_x) * (x[i] - mean_x);
      xy += (x[i] - mean_x) * (seconds[i] - mean_y);
    }
    LatencyFit fit{0.0, threshold, xx > 0 ? std::max(xy / xx, 0.0) : 0.0};
    fit.base = mean_y - fit.slope * mean_x;
    double error = 0;
    for (size_t i = 0; i < units.size(); ++i) {
      error += std::pow(fit.seconds(units[i]) - seconds[i], 2);
    }
    // A base below 0 would make time of nothing; of equal fits the one with the lower threshold.
    if (fit.base >= 0 && error < best_error * (1 - 1e-9)) best_error = error, best = fit;
  }
  return best;
}

KeptUnits search_latency(const UnitScores& heads, const UnitScores& neurons,
                         const LatencyFit& head_time, const LatencyFit& neuron_time, double limit) {
  check_scores(heads, neurons);
  auto head_rank = ranked(heads), neuron_rank = ranked(neurons);
  const size_t free_heads = free_first(head_rank, heads.size(), head_time.threshold);
  const size_t free_neurons = free_first(neuron_rank, neurons.size(), neuron_time.threshold);
  const double base = static_cast<double>(heads.size()) * head_time.base +
                      static_cast<double>(neurons.size()) * neuron_time.base;
  TORCH_CHECK_VALUE(limit >= base, "limit must be at least ", base,
                    " seconds, what the layers take with the fewest units, got ", limit);
  return search(heads, neurons, std::move(head_rank), free_heads, head_time.slope,
                std::move(neuron_rank), free_neurons, neuron_time.slope, base, limit);
}

}  // namespace headwise

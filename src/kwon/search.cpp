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

/// The largest number of units, at most `most`, that a limit allows.
size_t affordable(double limit, double cost, size_t most) {
  if (limit < 0) return 0;
  if (cost <= 0 || limit >= cost * static_cast<double>(most)) return most;
  auto count = static_cast<size_t>(limit / cost);
  // A quotient that rounding put just below a whole number.
  if (cost * static_cast<double>(count + 1) <= limit) ++count;
  while (count > 0 && cost * static_cast<double>(count) > limit) --count;
  return std::min(count, most);
}

/// Units of one kind that a search may keep, most important first. The first `base_units` are kept
/// in any case, for `base_cost` together; each further one costs `unit_cost`.
struct Ladder {
  std::vector<Ranked> units;
  size_t base_units = 0;
  double base_cost = 0;
  double unit_cost = 0;
  std::vector<double> sums;  // of the first 0, 1, ... scores

  size_t more() const { return units.size() - base_units; }
};

Ladder plain_ladder(const UnitScores& scores, double unit_cost) {
  Ladder ladder{ranked(scores), 0, 0.0, unit_cost, {}};
  ladder.sums = prefix_sums(ladder.units);
  return ladder;
}

/// Without the `dropped` layers whose first `threshold` units score least.
Ladder latency_ladder(const UnitScores& scores, const LatencyFit& time, size_t dropped) {
  const size_t layers = scores.size();
  std::vector<double> base(layers, 0.0);
  const std::vector<Ranked> all = ranked(scores);
  std::vector<int64_t> seen(layers, 0);
  for (const Ranked& unit : all) {
    if (seen[unit.layer]++ < time.threshold) base[unit.layer] += unit.score;
  }
  std::vector<size_t> order(layers);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return base[a] < base[b]; });
  std::vector<bool> stays(layers, true);
  for (size_t i = 0; i < dropped; ++i) stays[order[i]] = false;

  Ladder ladder{{}, 0, static_cast<double>(layers - dropped) * time.base, time.slope, {}};
  std::vector<Ranked> rest;
  std::fill(seen.begin(), seen.end(), 0);
  for (const Ranked& unit : all) {
    if (!stays[unit.layer]) continue;
    (seen[unit.layer]++ < time.threshold ? ladder.units : rest).push_back(unit);
  }
  ladder.base_units = ladder.units.size();
  ladder.units.insert(ladder.units.end(), rest.begin(), rest.end());
  ladder.sums = prefix_sums(ladder.units);
  return ladder;
}

struct Choice {
  double score = -1.0;
  double cost = 0;
  size_t heads = 0, neurons = 0;  // how many of the ladders' units
};

/// The best choice under `limit`; score -1 if there is none.
Choice best_choice(const Ladder& heads, const Ladder& neurons, double limit) {
  const double base = heads.base_cost + neurons.base_cost;
  const double slack = 1e-12 * std::max(limit, 0.0);  // of sums that rounding put above the limit
  Choice best;
  for (size_t extra = 0; extra <= heads.more(); ++extra) {
    // The limit of this round alone: a round must not spend what the next one needs.
    const double spent = base + heads.unit_cost * static_cast<double>(extra);
    const double left = limit - spent;
    if (left < -slack) break;
    const size_t more = affordable(std::max(left, 0.0) + slack, neurons.unit_cost, neurons.more());
    const size_t head_count = heads.base_units + extra;
    const size_t neuron_count = neurons.base_units + more;
    const double score = heads.sums[head_count] + neurons.sums[neuron_count];
    if (score > best.score) {
      best = {score, spent + neurons.unit_cost * static_cast<double>(more), head_count,
              neuron_count};
    }
  }
  return best;
}

KeptUnits kept_units(const Choice& choice, const Ladder& heads, const Ladder& neurons,
                     size_t head_layers, size_t neuron_layers) {
  return {by_layer(heads.units, choice.heads, head_layers),
          by_layer(neurons.units, choice.neurons, neuron_layers), std::max(choice.score, 0.0),
          choice.cost};
}

}  // namespace

KeptUnits search_macs(const UnitScores& heads, const UnitScores& neurons, double head_cost,
                      double neuron_cost, double limit) {
  check_scores(heads, neurons);
  TORCH_CHECK_VALUE(head_cost > 0 && neuron_cost > 0,
                    "head_cost and neuron_cost must be positive, ", "got ", head_cost, " and ",
                    neuron_cost);
  TORCH_CHECK_VALUE(limit >= 0, "limit must not be negative, got ", limit);
  const Ladder head_ladder = plain_ladder(heads, head_cost);
  const Ladder neuron_ladder = plain_ladder(neurons, neuron_cost);
  return kept_units(best_choice(head_ladder, neuron_ladder, limit), head_ladder, neuron_ladder,
                    heads.size(), neurons.size());
}

double LatencyFit::seconds(int64_t units) const {
  if (units == 0) return 0.0;  // the block is not run
  return base + slope * static_cast<double>(std::max<int64_t>(units - threshold, 0));
}

LatencyFit fit_latency(const std::vector<int64_t>& units, const std::vector<double>& seconds) {
  TORCH_CHECK_VALUE(units.size() >= 2 && units.size() == seconds.size(),
                    "units and seconds must have the same length, at least 2, got ", units.size(),
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
    // A base below 0 would be a negative time; of equal fits the one with the lower threshold.
    if (fit.base >= 0 && error < best_error * (1 - 1e-9)) best_error = error, best = fit;
  }
  return best;
}

KeptUnits search_latency(const UnitScores& heads, const UnitScores& neurons,
                         const LatencyFit& head_time, const LatencyFit& neuron_time, double limit) {
  check_scores(heads, neurons);
  // At least one layer of each kind stays.
  const auto least = [](const UnitScores& scores, const LatencyFit& time) {
    return scores.empty() ? 0.0 : time.base;
  };
  const double base = least(heads, head_time) + least(neurons, neuron_time);
  TORCH_CHECK_VALUE(limit >= base * (1 - 1e-12), "limit must be at least ", base,
                    " seconds, what one layer of each kind takes with the fewest units, got ",
                    limit);
  std::vector<Ladder> neuron_ladders;
  for (size_t drops = 0; drops < std::max<size_t>(neurons.size(), 1); ++drops) {
    neuron_ladders.push_back(latency_ladder(neurons, neuron_time, drops));
  }
  Choice best;
  KeptUnits kept;
  for (size_t drops = 0; drops < std::max<size_t>(heads.size(), 1); ++drops) {
    const Ladder head_ladder = latency_ladder(heads, head_time, drops);
    for (const Ladder& neuron_ladder : neuron_ladders) {
      const Choice found = best_choice(head_ladder, neuron_ladder, limit);
      if (found.score <= best.score)
        continue;  // of equal ones, that with the fewest layers dropped
      best = found;
      kept = kept_units(best, head_ladder, neuron_ladder, heads.size(), neurons.size());
    }
  }
  return kept;
}

}  // namespace headwise

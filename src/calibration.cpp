#include "headwise/calibration.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "calibration.h"
#include "explain/numbers.h"
#include "headwise/instrument.h"

namespace headwise {

Trial nearest_by_halving(const std::function<double(double)>& value, double target, double low,
                         double high, int64_t passes, Trial start) {
  Trial best = start;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const double middle = (low + high) / 2;
    const double found = value(middle);
    if (std::abs(found - target) < std::abs(best.value - target)) best = {middle, found};
    (found > target ? low : high) = middle;
  }
  return best;
}

double find_threshold(const std::function<GateUse(double)>& run, double keep, int64_t passes,
                      double tolerance) {
  TORCH_CHECK_VALUE(keep > 0.0 && keep <= 1.0, "keep must be in (0, 1], got ", keep);
  TORCH_CHECK_VALUE(tolerance >= 0.0 && tolerance <= 1.0, "tolerance must be between 0 and 1, got ",
                    tolerance);
  double highest = 0;
  const auto share = [&](double threshold) {
    const GateUse use = run(threshold);
    TORCH_CHECK_VALUE(use.heads > 0, "forward_fn must run the model on at least one input");
    highest = std::max(highest, use.highest_relevance);
    return static_cast<double>(use.heads_run) / static_cast<double>(use.heads);
  };
  const Trial open{0.0, share(0.0)};
  const Trial nearest = nearest_by_halving(share, keep, 0.0, highest, passes, open);
  char found[32];
  std::snprintf(found, sizeof found, "%.4f", nearest.value);
  TORCH_CHECK_VALUE(std::abs(nearest.value - keep) <= tolerance, "keep=", rounded(keep, 6),
                    " cannot be reached: the nearest share of heads is ", found, " (threshold ",
                    rounded(nearest.argument, 6), "); ",
                    nearest.value > keep
                        ? "min_heads of the gates allows no less"
                        : "the other heads score zero: raise the gates' resolution");
  return nearest.argument;
}

double calibrate_threshold(const AttentionLayers& layers, const std::function<void()>& forward_fn,
                           double keep, int64_t passes, double tolerance) {
  const at::NoGradGuard no_grad;
  AttentionLayers gated;
  std::vector<at::Tensor> thresholds, before;
  for (const auto& item : layers) {
    if (auto* gate = dynamic_cast<ThresholdGateImpl*>(item.second->gate.get())) {
      gated.push_back(item);
      thresholds.push_back(gate->threshold);
      before.push_back(gate->threshold.clone());
    }
  }
  TORCH_CHECK_VALUE(!gated.empty(), "layers must have a ThresholdGate, got none");
  GateUse use;
  Instrumented opened(gated);
  opened.override_with([&](size_t, int64_t, const at::TensorOptions&, const Choose& choose) {
    Selection selection = choose();
    use.heads_run += selection.count.sum().item<int64_t>();
    use.heads += selection.weight.numel();
    if (selection.relevance.numel() > 0) {
      use.highest_relevance =
          std::max(use.highest_relevance, selection.relevance.max().item<double>());
    }
    return selection;
  });
  const auto set = [&](double threshold) {
    for (at::Tensor& own : thresholds) own.fill_(threshold);
  };
  const auto run = [&](double threshold) {
    set(threshold);
    use = {};
    forward_fn();
    return use;
  };
  try {
    const double found = find_threshold(run, keep, passes, tolerance);
    set(found);
    return found;
  } catch (...) {
    for (size_t i = 0; i < thresholds.size(); ++i) thresholds[i].copy_(before[i]);
    throw;
  }
}

}  // namespace headwise

#include "headwise/calibration.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "analysis/intervention.h"
#include "explain/numbers.h"

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

void check_calibrated(const Trial& nearest, double keep, double tolerance) {
  char share[32];
  std::snprintf(share, sizeof share, "%.4f", nearest.value);
  TORCH_CHECK_VALUE(std::abs(nearest.value - keep) <= tolerance, "keep=", rounded(keep, 6),
                    " cannot be reached: the nearest share of heads is ", share, " (threshold ",
                    rounded(nearest.argument, 6), "); ",
                    nearest.value > keep
                        ? "min_heads of the gates allows no less"
                        : "the other heads score zero: raise the gates' resolution");
}

double calibrate_threshold(const AttentionLayers& layers, const std::function<void()>& forward,
                           double keep, int64_t passes, double tolerance) {
  TORCH_CHECK_VALUE(keep > 0.0 && keep <= 1.0, "keep must be in (0, 1], got ", keep);
  TORCH_CHECK_VALUE(tolerance >= 0.0 && tolerance <= 1.0, "tolerance must be between 0 and 1, got ",
                    tolerance);
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
  const auto set = [&](double threshold) {
    for (at::Tensor& own : thresholds) own.fill_(threshold);
  };
  double ran = 0, there = 0, highest = 0;
  const analysis::Change record = [&](const Selection& selection) {
    ran += static_cast<double>(selection.count.sum().item<int64_t>());
    there += static_cast<double>(selection.weight.numel());
    if (selection.relevance.numel() > 0) {
      highest = std::max(highest, selection.relevance.max().item<double>());
    }
    return selection;
  };
  const analysis::Intervention intervention(gated, std::vector(gated.size(), record));
  const auto share = [&](double threshold) {
    set(threshold);
    ran = there = 0;
    forward();
    TORCH_CHECK_VALUE(there > 0, "forward must run the model on at least one input");
    return ran / there;
  };
  try {
    const Trial open{0.0, share(0.0)};
    const Trial nearest = nearest_by_halving(share, keep, 0.0, highest, passes, open);
    check_calibrated(nearest, keep, tolerance);
    set(nearest.argument);
    return nearest.argument;
  } catch (...) {
    for (size_t i = 0; i < thresholds.size(); ++i) thresholds[i].copy_(before[i]);
    throw;
  }
}

}  // namespace headwise

#include "ops/gates/schedule.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

namespace headwise {
namespace {

double logit(double fraction) {
  const double held = std::clamp(fraction, 1e-3, 1.0 - 1e-3);
  return std::log(held / (1.0 - held));
}

}  // namespace

at::Tensor reached(const at::Tensor& progress, double when, at::ScalarType dtype) {
  return progress.detach().ge(when).to(dtype);
}

at::Tensor warmup_logit(const at::Tensor& progress, double initial, double keep, double warmup,
                        at::ScalarType dtype) {
  const auto p = progress.detach().to(dtype);
  if (warmup <= 0.0) {
    return at::zeros_like(p);
  }
  return (1.0 - p / warmup).clamp_min(0.0) * warmup_start(initial, keep);
}

double warmup_start(double initial, double keep) { return logit(initial) - logit(keep); }

at::Tensor scheduled_target(const at::Tensor& progress, double initial, double keep, double warmup,
                            at::ScalarType dtype) {
  return at::sigmoid(warmup_logit(progress, initial, keep, warmup, dtype) + logit(keep));
}

}  // namespace headwise

#include "kernels/cpu/softmax.h"

#include <cmath>
#include <limits>

#include "kernels/cpu/simd.h"

namespace headwise::kernels {

namespace {

HEADWISE_INLINE float maximum_of(const float* x, int64_t n) {
  Float16 top = Float16{} - kInfinity, v;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(x + i, v);
    top = v > top ? v : top;
  }
  float best = lane_maximum(top);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

HEADWISE_INLINE float exponential_of(float* x, int64_t n, float scale, float shift) {
  Float16 sum = {}, v;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(x + i, v);
    v = v * scale - shift;
    exponential(v);
    store(x + i, v);
    sum += v;
  }
  if (i < n) {
    // The tail in a register of -inf, which adds nothing.
    const int64_t rest = n - i;
    float tail[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane)
      tail[lane] = lane < rest ? x[i + lane] * scale - shift : -kInfinity;
    load(tail, v);
    exponential(v);
    sum += v;
    store(tail, v);
    for (int64_t lane = 0; lane < rest; ++lane) x[i + lane] = tail[lane];
  }
  return lane_sum(sum);
}

}  // namespace

HEADWISE_CLONES
float row_maximum(const float* x, int64_t n) { return maximum_of(x, n); }

HEADWISE_CLONES
float row_exponential(float* x, int64_t n, float scale, float shift) {
  return exponential_of(x, n, scale, shift);
}

HEADWISE_CLONES
void softmax_block(float* s, int64_t lds, int64_t rows, int64_t n, float scale, float* maximum,
                   float* sum, float* rescale) {
  for (int64_t i = 0; i < rows; ++i, s += lds) {
    const float before = maximum[i], own = maximum_of(s, n) * scale;
    const float top = before < own ? own : before;
    // A row that has seen nothing yet is shifted by 0, so that exp(-inf) = 0 and not NaN.
    const float shift = top == -kInfinity ? 0.f : top;
    rescale[i] = before == -kInfinity ? 0.f : std::exp(before - shift);
    sum[i] = sum[i] * rescale[i] + exponential_of(s, n, scale, shift);
    maximum[i] = top;
  }
}

HEADWISE_CLONES
void shifted_exponential(float* x, int64_t n, float scale, const float* shift) {
  Float16 v, s;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load(x + i, v);
    load(shift + i, s);
    v = v * scale - s;
    exponential(v);
    store(x + i, v);
  }
  if (i < n) {
    float tail[kLanes] = {};
    for (int64_t lane = 0; lane < n - i; ++lane) tail[lane] = x[i + lane] * scale - shift[i + lane];
    load(tail, v);
    exponential(v);
    store(tail, v);
    for (int64_t lane = 0; lane < n - i; ++lane) x[i + lane] = tail[lane];
  }
}

HEADWISE_CLONES
void shifted_gradient(const float* p, int64_t n, const float* delta, float scale, float* dp) {
  for (int64_t i = 0; i < n; ++i) dp[i] = p[i] == 0.f ? 0.f : scale * p[i] * (dp[i] - delta[i]);
}

HEADWISE_CLONES
void row_gradient(const float* p, int64_t n, float delta, float* dp) {
  for (int64_t i = 0; i < n; ++i) dp[i] = p[i] == 0.f ? 0.f : p[i] * (dp[i] - delta);
}

double row_maximum(const double* x, int64_t n) {
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

double row_exponential(double* x, int64_t n, double scale, double shift) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] * scale - shift);
    sum += x[i];
  }
  return sum;
}

void row_gradient(const double* p, int64_t n, double delta, double* dp) {
  for (int64_t i = 0; i < n; ++i) dp[i] = p[i] == 0 ? 0 : p[i] * (dp[i] - delta);
}

}  // namespace headwise::kernels

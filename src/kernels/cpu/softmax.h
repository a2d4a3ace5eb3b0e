// The row operations of attention: vectors for float, plain loops for double.
#pragma once

#include <cstdint>
#include <limits>

namespace headwise::kernels {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Largest of n values (NaN is passed over); -inf where n = 0.
float row_maximum(const float* x, int64_t n);
double row_maximum(const double* x, int64_t n);

/// x = exp(x * scale - shift) in place; returns the sum.
float row_exponential(float* x, int64_t n, float scale, float shift);
double row_exponential(double* x, int64_t n, double scale, double shift);

/// One block of n keys of the running softmax of some rows (lds apart): s = exp(s * scale - m) in
/// place, m the row's maximum so far. `maximum` and `sum` continue from block to block; sums over
/// earlier blocks must be multiplied by `rescale`.
void softmax_block(float* s, int64_t lds, int64_t rows, int64_t n, float scale, float* maximum,
                   float* sum, float* rescale);

/// dp = p * (dp - delta), the gradient of the scores of a row of softmax; 0 where p = 0: a masked
/// key gets no gradient, whatever its value.
void row_gradient(const float* p, int64_t n, float delta, float* dp);
void row_gradient(const double* p, int64_t n, double delta, double* dp);

/// x = exp(x * scale - shift[i]) in place, a shift for every element: tiles whose rows are keys.
void shifted_exponential(float* x, int64_t n, float scale, const float* shift);

/// dp = scale * p * (dp - delta[i]); 0 where p = 0, as in row_gradient.
void shifted_gradient(const float* p, int64_t n, const float* delta, float scale, float* dp);

}  // namespace headwise::kernels

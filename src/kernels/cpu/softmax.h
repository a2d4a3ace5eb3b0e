// The row operations of attention on float tiles.
#pragma once

#include <cstdint>

namespace headwise::kernels {

/// Largest of n values (NaN is passed over); -inf where n = 0.
float row_maximum(const float* x, int64_t n);

/// x = exp(x * scale - shift) in place; returns the sum.
float row_exponential(float* x, int64_t n, float scale, float shift);

/// y = x * factor
void row_scale(const float* x, int64_t n, float factor, float* y);

/// y = x + bias (bias may be null)
void row_add(const float* x, const float* bias, int64_t n, float* y);

}  // namespace headwise::kernels

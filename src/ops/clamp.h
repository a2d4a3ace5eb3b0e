#pragma once

#include <ATen/Functions.h>

namespace headwise {

/// x clamped to [low, high]; the gradient passes at both ends.
///
/// at::clamp passes it there in torch 2.11 and does not in 2.15, so a value that begins or rests
/// exactly at an end would be stuck there. NaN stays NaN.
inline at::Tensor clamp_inclusive(const at::Tensor& x, double low, double high) {
  return at::where(x.lt(low), low, at::where(x.gt(high), high, x));
}

}  // namespace headwise

// Numbers for JSON.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "json.h"

namespace headwise {

/// `value` with `digits` significant digits (a float32 holds seven); null if it is not finite,
/// which JSON cannot express.
inline Json number(double value, int digits = 7) {
  if (!std::isfinite(value)) return nullptr;
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return std::strtod(text, nullptr);
}

/// `value` with `digits` significant digits, for messages.
inline std::string rounded(double value, int digits) {
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

/// float64 on the host, contiguous.
inline at::Tensor host(const at::Tensor& tensor) {
  return tensor.detach().to(at::kCPU, at::kDouble).contiguous();
}

/// A list of the values of a tensor of float64 on the host, or a list of lists if it is [n, m].
inline Json numbers(const at::Tensor& values, int digits = 7) {
  Json list = Json::array();
  if (values.dim() > 1) {
    for (int64_t i = 0; i < values.size(0); ++i) list.push_back(numbers(values[i], digits));
    return list;
  }
  const at::Tensor flat = values.contiguous();
  const double* data = flat.const_data_ptr<double>();
  for (int64_t i = 0; i < flat.numel(); ++i) list.push_back(number(data[i], digits));
  return list;
}

}  // namespace headwise

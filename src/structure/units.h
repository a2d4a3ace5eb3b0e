// Units (heads, neurons, dimensions) that stay, checked and taken from tensors.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "headwise/export.h"

namespace headwise {

/// @throws c10::ValueError if `units` are not ascending, different and below `size`, or `scale` has
///         not one finite number for each. `kind` ("neurons") and `what` name them in messages.
inline void check_units(const std::vector<int64_t>& units, const std::vector<double>& scale,
                        int64_t size, const char* kind, const std::string& what) {
  for (size_t i = 0; i < units.size(); ++i) {
    TORCH_CHECK_VALUE(units[i] >= 0 && units[i] < size, kind, " in ", what,
                      " must be between 0 and ", size - 1, ", got ", units[i]);
    TORCH_CHECK_VALUE(i == 0 || units[i] > units[i - 1], kind, " in ", what,
                      " must be ascending and different, got ", units[i], " after ",
                      units[i == 0 ? 0 : i - 1]);
  }
  TORCH_CHECK_VALUE(scale.size() == units.size(), "scale in ", what,
                    " must have a number for each of its ", units.size(), " ", kind, ", got ",
                    scale.size());
  for (const double value : scale) {
    TORCH_CHECK_VALUE(std::isfinite(value), "scale in ", what, " must be finite, got ", value);
  }
}

/// `units` of `parameter` along `dim`, multiplied by `scale` if there is one.
inline at::Tensor take_units(const at::Tensor& parameter, int64_t dim,
                             const std::vector<int64_t>& units,
                             const std::vector<double>* scale = nullptr) {
  const auto index = at::tensor(units, at::TensorOptions(at::kLong)).to(parameter.device());
  at::Tensor kept = parameter.index_select(dim, index);
  if (scale == nullptr) return kept;
  std::vector<int64_t> shape(parameter.dim(), 1);
  shape[dim] = static_cast<int64_t>(units.size());
  // In float64, so that a scale is rounded once, with the product.
  const at::Tensor factor =
      at::tensor(*scale, at::TensorOptions(at::kDouble)).to(parameter.device()).view(shape);
  return (kept.to(at::kDouble) * factor).to(parameter.scalar_type());
}

/// Multiply-accumulates of one head of width `head_dim` in a layer of width `width`, for a sequence
/// of `tokens`: 4 n D d (query, key, value and output projections) + 2 n^2 d (scores, and their
/// product with the values).
HEADWISE_API double head_macs(double tokens, int64_t width, int64_t head_dim);

/// Multiply-accumulates of one neuron of a feed-forward network: 2 n D.
HEADWISE_API double neuron_macs(double tokens, int64_t width);

}  // namespace headwise

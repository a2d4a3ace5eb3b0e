// Checks of gates' options, and small helpers of their modules.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <optional>

namespace headwise {

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline void check_unit(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && value <= 1.0, name, " must be between 0 and 1, got ", value);
}

inline void check_not_negative(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && std::isfinite(value), name,
                    " must be finite and not negative, got ", value);
}

/// A linear layer that may have no outputs: Linear's own initialisation divides by its width.
torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias, const at::TensorOptions& tensors);

}  // namespace headwise

// What gates check of their options, and small helpers of their modules.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>

namespace headwise {

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline void check_fraction(const char* name, double value) {
  TORCH_CHECK_VALUE(value > 0.0 && value <= 1.0, name, " must be in (0, 1], got ", value);
}

inline void check_unit(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && value <= 1.0, name, " must be between 0 and 1, got ", value);
}

inline void check_positive(const char* name, double value) {
  TORCH_CHECK_VALUE(value > 0.0 && std::isfinite(value), name, " must be positive and finite, got ",
                    value);
}

inline void check_not_negative(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && std::isfinite(value), name,
                    " must be finite and not negative, got ", value);
}

inline void check_hard_from(double value) {
  TORCH_CHECK_VALUE(value >= 0.0, "hard_from must not be negative, got ", value);
}

inline void check_choice(const char* name, const std::string& value,
                         std::initializer_list<const char*> choices) {
  std::string listed;
  for (const char* choice : choices) {
    if (value == choice) return;
    listed += (listed.empty() ? "" : ", ") + std::string(choice);
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", listed, ", got '", value, "'");
}

/// A linear layer that may have no outputs: Linear's own initialisation divides by its width.
torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias, const at::TensorOptions& tensors);

}  // namespace headwise

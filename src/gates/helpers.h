// Small helpers of gate modules.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/linear.h>

#include <optional>

namespace headwise {

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

/// A linear layer that may have no inputs or outputs: Linear's own initialisation divides by its
/// width.
torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias, const at::TensorOptions& tensors);

}  // namespace headwise

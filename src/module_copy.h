// Deep copies of modules, for clone().
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/nn/module.h>

#include <optional>

namespace headwise {

/// Gives `to`, which has the parameters and buffers of `from` by the same names, copies of their
/// values, on `device` if there is one, and the same modes of training.
inline void copy_tensors(const torch::nn::Module& from, torch::nn::Module& to,
                         const std::optional<torch::Device>& device) {
  const at::NoGradGuard no_grad;
  const auto copy = [&](const auto& items, auto copies) {
    TORCH_CHECK(items.size() == copies.size(), "clone() needs a ", from.name(),
                " with the tensors that it was made with, got ", items.size(), " instead of ",
                copies.size());
    for (const auto& item : items) {
      auto& tensor = copies[item.key()];
      const auto& value = item.value();
      tensor.set_data(device && value.device() != *device ? value.to(*device) : value.clone());
      if (tensor.requires_grad() != value.requires_grad()) {
        tensor.set_requires_grad(value.requires_grad());
      }
    }
  };
  copy(from.named_parameters(), to.named_parameters());
  copy(from.named_buffers(), to.named_buffers());
  to.train(from.is_training());
  for (const auto& child : from.named_modules("", /*include_self=*/false)) {
    to.named_modules("", false)[child.key()]->train(child.value()->is_training());
  }
}

}  // namespace headwise

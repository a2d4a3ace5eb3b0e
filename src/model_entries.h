// The attention layers of a model's folder: their entries in its description, and their tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "headwise/model.h"
#include "json.h"

namespace headwise {

constexpr const char* kDescription = "headwise.json";
constexpr const char* kWeights = "model.safetensors";

inline std::string shown_name(const std::string& name) { return shown(name, 100, '\''); }

inline std::string join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

/// A layer's parameters and buffers, by their names within it.
std::vector<std::pair<std::string, at::Tensor>> state(const torch::nn::Module& layer);

Json describe(const std::string& name, const MultiheadAttentionImpl& layer);
Json describe(const std::string& name, const GroupedQueryAttentionImpl& layer);

/// Adds the layer of `entry` to `model`, whose tensors become its parameters, and returns its gate
/// or null. `what` names the entry in messages. @throws c10::ValueError
GateImpl* read_layer(Model& model, const Json& entry, const std::string& what,
                     const at::Device& device);

}  // namespace headwise

// What the programs share that Python's tests run on a folder: see tests/python/cpp.
#pragma once

#include <torch/torch.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "headwise/gates.h"
#include "headwise/selection.h"
#include "headwise/weights.h"

namespace parity {

using Json = nlohmann::json;

inline Json read_json(const std::string& path) {
  std::ifstream stream(path);
  return Json::parse(stream);
}

/// The tensor of that name in a file; undefined if there is none.
inline at::Tensor tensor(const headwise::NamedTensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? at::Tensor() : found->second;
}

/// A layer of FOLDER/layer.json with the parameters and buffers "state.NAME" of the file.
template <typename Layer, typename Options>
Layer build(Options options, const Json& gate, const headwise::NamedTensors& tensors) {
  if (!gate.is_null()) options.gate(headwise::gate_options_from_json(gate.dump()));
  Layer layer(options.dtype(at::kDouble));
  headwise::link_gates(*layer);
  auto state = layer->named_parameters();
  for (const auto& item : layer->named_buffers()) state.insert(item.key(), item.value());
  constexpr std::string_view prefix = "state.";
  size_t loaded = 0;
  for (const auto& [name, tensor] : tensors) {
    if (!name.starts_with(prefix)) continue;
    const torch::NoGradGuard no_grad;
    state[name.substr(prefix.size())].copy_(tensor);
    ++loaded;
  }
  TORCH_CHECK(loaded == state.size(), "the layer has ", state.size(), " tensors, the file ",
              loaded);
  return layer;
}

/// Backward of (output * cotangent).sum() + penalty; adds "output", "weights", "penalty",
/// "grad.NAME" and the selection to `results`.
template <typename Layer>
void differentiate(const Layer& layer, const at::Tensor& output, const at::Tensor& weights,
                   const at::Tensor& cotangent, const std::optional<headwise::Selection>& selection,
                   headwise::NamedTensors& results) {
  const auto penalty = headwise::penalty(*layer);
  ((output * cotangent).sum() + penalty).backward();
  results["output"] = output.detach();
  results["weights"] = weights.detach();
  results["penalty"] = penalty.detach().to(at::kDouble);
  for (const auto& item : layer->named_parameters()) {
    if (item.value().grad().defined()) results["grad." + item.key()] = item.value().grad();
  }
  if (selection) {
    results["index"] = selection->index;
    results["count"] = selection->count;
    results["weight"] = selection->weight.detach();
  }
}

/// main() of a program: 1 and one line if `run` raises, 2 if called with other arguments.
template <typename Run>
int main(bool called_right, const char* usage, const Run& run) {
  if (!called_right) {
    std::cerr << "usage: " << usage << "\n";
    return 2;
  }
  try {
    run();
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}

}  // namespace parity

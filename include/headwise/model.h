// A model as a self-describing folder, as headwise.save writes and headwise.load reads it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "headwise/export.h"
#include "headwise/grouped_query_attention.h"
#include "headwise/multihead_attention.h"
#include "headwise/weights.h"

namespace headwise {

/// The attention layers of a model, ready to run, and every tensor of it. The caller computes the
/// rest of the model: examples/cpp/bert.cpp does it for a BERT classifier, decoder.cpp for Llama.
struct HEADWISE_API Model {
  /// By name, in the order of the model's definition; gates included, in evaluation mode.
  std::vector<std::pair<std::string, MultiheadAttention>> layers;
  /// The same of attention with a cache, grouped heads or rotary positions: decoders.
  GroupedLayers grouped_layers;
  /// Every tensor by its name in the state_dict. Those of the layers are their parameters and
  /// buffers themselves, so training a layer changes them here too.
  NamedTensors tensors;
  /// JSON object: "library", "class" and, for a model of transformers, "config" (what differs from
  /// the defaults of its configuration class).
  std::string architecture = R"({"library": "torch", "class": "unknown"})";
  /// JSON object, or empty: the widths of the feed-forward networks and of the residual stream, as
  /// Python wrote them. They follow from `tensors` too; stored so that Python can read it again.
  std::string structure;

  /// @throws c10::IndexError if there is none of this name
  const MultiheadAttention& layer(const std::string& name) const;
  /// @throws c10::IndexError if there is none of this name
  const GroupedQueryAttention& grouped_layer(const std::string& name) const;
  /// @throws c10::IndexError if there is none of this name
  const at::Tensor& tensor(const std::string& name) const;
};

/// Reads the folder `dir` that headwise::save or headwise.save wrote.
/// @throws FileError       if one of its two files cannot be read
/// @throws c10::ValueError if a file is invalid, or a layer computes what only Python can: what and
///                         where in one sentence
HEADWISE_API Model load(const std::string& dir, const at::Device& device = at::kCPU);

/// Writes `model` to the folder `dir` atomically; a folder that save wrote is replaced.
/// @throws c10::ValueError if `dir` is something else, layers share a name, or
///                         `architecture` is not a JSON object
/// @throws FileError       if it cannot be written
HEADWISE_API void save(const Model& model, const std::string& dir);

}  // namespace headwise

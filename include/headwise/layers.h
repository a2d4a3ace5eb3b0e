// Finding the attention layers of a model.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "headwise/export.h"
#include "headwise/multihead_attention.h"

namespace headwise {

/// Attention layers by name, in the order of the model; Model::layers is one.
using AttentionLayers = std::vector<std::pair<std::string, MultiheadAttention>>;

/// Every MultiheadAttention within `model`, by its qualified name, in the order in which they were
/// registered. The layers are the model's own, not copies.
HEADWISE_API AttentionLayers attention_layers(torch::nn::Module& model);

/// Runs the model that layers belong to on one of its batches, numbered from 0, and returns the
/// loss of every example [B]. The caller owns the model and puts it in evaluation mode.
using BatchLoss = std::function<at::Tensor(int64_t batch)>;

}  // namespace headwise

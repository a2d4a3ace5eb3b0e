// Runs one layer for tests/python/cpp/test_cpp_parity.py: reads its options, parameters and inputs
// from a folder, writes what it computed.
//
//   layer_parity FOLDER
//
// FOLDER/layer.json       {"embed_dim", "num_heads", ..., "gate": {...} or null, "call": {...}}
// FOLDER/input.safetensors   "state.NAME" for every parameter and buffer; "query", "key", "value",
//                         "cotangent", and "key_padding_mask", "attn_mask" if there are any
// FOLDER/output.safetensors  "output", "weights", "penalty", "index", "count", "weight",
//                         "grad.NAME" for every parameter and "grad_query"
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "headwise/multihead_attention.h"
#include "headwise/weights.h"

namespace {

using Json = nlohmann::json;

headwise::MultiheadAttention build(const Json& json) {
  auto options = headwise::MultiheadAttentionOptions(json.at("embed_dim").get<int64_t>(),
                                                     json.at("num_heads").get<int64_t>())
                     .dropout(json.at("dropout").get<double>())
                     .bias(json.at("bias").get<bool>())
                     .add_bias_kv(json.at("add_bias_kv").get<bool>())
                     .add_zero_attn(json.at("add_zero_attn").get<bool>())
                     .batch_first(json.at("batch_first").get<bool>())
                     .dtype(at::kDouble);
  if (!json.at("kdim").is_null()) options.kdim(json.at("kdim").get<int64_t>());
  if (!json.at("vdim").is_null()) options.vdim(json.at("vdim").get<int64_t>());
  if (!json.at("head_dim").is_null()) options.head_dim(json.at("head_dim").get<int64_t>());
  if (!json.at("gate").is_null()) {
    options.gate(headwise::gate_options_from_json(json.at("gate").dump()));
  }
  return headwise::MultiheadAttention(options);
}

void run(const std::string& folder) {
  std::ifstream stream(folder + "/layer.json");
  const auto json = Json::parse(stream);
  auto file = headwise::load_safetensors(folder + "/input.safetensors");
  auto layer = build(json);
  headwise::link_gates(*layer);
  auto state = layer->named_parameters();
  for (const auto& item : layer->named_buffers()) state.insert(item.key(), item.value());
  const std::string prefix = "state.";
  size_t loaded = 0;
  for (const auto& [name, tensor] : file.tensors) {
    if (name.starts_with(prefix)) {
      torch::NoGradGuard no_grad;
      state[name.substr(prefix.size())].copy_(tensor);
      ++loaded;
    }
  }
  TORCH_CHECK(loaded == state.size(), "the layer has ", state.size(), " tensors, the file ",
              loaded);

  const auto& call = json.at("call");
  layer->train(call.at("training").get<bool>());
  const auto input = [&](const char* name) {
    const auto found = file.tensors.find(name);
    return found == file.tensors.end() ? at::Tensor() : found->second;
  };
  auto query = input("query").requires_grad_();
  const auto key = input("key").defined() ? input("key") : query;
  const auto value = input("value").defined() ? input("value") : key;
  torch::manual_seed(call.at("seed").get<int64_t>());
  std::optional<headwise::Selection> selection;
  layer->on_selection = [&](const headwise::Selection& chosen) { selection = chosen; };
  const auto [output, weights] = layer->forward(
      query, key, value, input("key_padding_mask"), /*need_weights=*/true, input("attn_mask"),
      call.at("average_attn_weights").get<bool>(), call.at("is_causal").get<bool>());
  const auto penalty = headwise::penalty(*layer);
  ((output * input("cotangent")).sum() + penalty).backward();

  headwise::NamedTensors results{{"output", output.detach()},
                                 {"weights", weights.detach()},
                                 {"penalty", penalty.detach().to(at::kDouble)},
                                 {"grad_query", query.grad()}};
  for (const auto& item : layer->named_parameters()) {
    if (item.value().grad().defined()) results["grad." + item.key()] = item.value().grad();
  }
  for (const auto& item : layer->named_buffers()) results["buffer." + item.key()] = item.value();
  if (selection) {
    results["index"] = selection->index;
    results["count"] = selection->count;
    results["weight"] = selection->weight.detach();
  }
  headwise::save_safetensors(folder + "/output.safetensors", results);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: layer_parity FOLDER\n";
    return 2;
  }
  try {
    run(argv[1]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}

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
#include "headwise/multihead_attention.h"
#include "parity.h"

namespace {

using parity::Json;

headwise::MultiheadAttentionOptions options_of(const Json& json) {
  auto options = headwise::MultiheadAttentionOptions(json.at("embed_dim").get<int64_t>(),
                                                     json.at("num_heads").get<int64_t>())
                     .dropout(json.at("dropout").get<double>())
                     .bias(json.at("bias").get<bool>())
                     .add_bias_kv(json.at("add_bias_kv").get<bool>())
                     .add_zero_attn(json.at("add_zero_attn").get<bool>())
                     .batch_first(json.at("batch_first").get<bool>());
  if (!json.at("kdim").is_null()) options.kdim(json.at("kdim").get<int64_t>());
  if (!json.at("vdim").is_null()) options.vdim(json.at("vdim").get<int64_t>());
  if (!json.at("head_dim").is_null()) options.head_dim(json.at("head_dim").get<int64_t>());
  return options;
}

void run(const std::string& folder) {
  const auto json = parity::read_json(folder + "/layer.json");
  const auto tensors = headwise::load_safetensors(folder + "/input.safetensors").tensors;
  auto layer =
      parity::build<headwise::MultiheadAttention>(options_of(json), json.at("gate"), tensors);
  const auto& call = json.at("call");
  layer->train(call.at("training").get<bool>());
  const auto input = [&](const char* name) { return parity::tensor(tensors, name); };
  auto query = input("query").requires_grad_();
  const auto key = input("key").defined() ? input("key") : query;
  const auto value = input("value").defined() ? input("value") : key;
  torch::manual_seed(call.at("seed").get<int64_t>());
  std::optional<headwise::Selection> selection;
  layer->on_selection = [&](const headwise::Selection& chosen) { selection = chosen; };
  const auto [output, weights] = layer->forward(
      query, key, value, input("key_padding_mask"), /*need_weights=*/true, input("attn_mask"),
      call.at("average_attn_weights").get<bool>(), call.at("is_causal").get<bool>());
  headwise::NamedTensors results;
  parity::differentiate(layer, output, weights, input("cotangent"), selection, results);
  results["grad_query"] = query.grad();
  for (const auto& item : layer->named_buffers()) results["buffer." + item.key()] = item.value();
  headwise::save_safetensors(folder + "/output.safetensors", results);
}

}  // namespace

int main(int argc, char** argv) {
  return parity::main(argc == 2, "layer_parity FOLDER", [&] { run(argv[1]); });
}

// Runs one decoder layer for tests/python/cpp/test_cpp_decoders.py: reads its options, parameters
// and inputs from a folder, writes what it computed.
//
//   decoder_parity FOLDER
//   decoder_parity FROM TO [PLAN]    loads the model in the folder FROM, prunes it by the plan in
//                                    the file PLAN if there is one, and saves it as TO
//
// FOLDER/layer.json       {"embed_dim", "num_heads", ..., "gate": {...} or null, "call": {...}};
//                         "heads" and "scale" of "call" or null: the layer is pruned to these first
// FOLDER/input.safetensors   "state.NAME" for every parameter and buffer; "x", "cotangent", and
//                         "cos", "sin", "key_padding_mask", "attn_mask", "seen" if there are any
// FOLDER/output.safetensors  of one call: "output", "weights", "penalty", "index", "count",
//                         "weight", "grad.NAME" for every parameter and "grad_x"; of the tokens up
//                         to each of "ends" in turn, with a cache: "steps", "counts", "k", "v",
//                         "slots"
#include "headwise/grouped_query_attention.h"
#include "headwise/model.h"
#include "headwise/pruning.h"
#include "parity.h"

namespace {

using parity::Json;

template <typename T>
std::optional<T> get_optional(const Json& json, const char* key) {
  return json.at(key).is_null() ? std::nullopt : std::optional(json.at(key).get<T>());
}

headwise::GroupedQueryAttentionOptions options_of(const Json& json) {
  return headwise::GroupedQueryAttentionOptions(json.at("embed_dim").get<int64_t>(),
                                                json.at("num_heads").get<int64_t>())
      .num_key_value_heads(get_optional<int64_t>(json, "num_key_value_heads"))
      .head_dim(get_optional<int64_t>(json, "head_dim"))
      .dropout(json.at("dropout").get<double>())
      .bias(json.at("bias").get<bool>())
      .output_bias(get_optional<bool>(json, "output_bias"))
      .scale(get_optional<double>(json, "scale"))
      .qk_norm_eps(get_optional<double>(json, "qk_norm_eps"))
      .sliding_window(get_optional<int64_t>(json, "sliding_window"))
      .key_value_heads(get_optional<std::vector<int64_t>>(json, "key_value_heads"))
      .keep_selection(json.at("keep_selection").get<bool>());
}

void run(const std::string& folder) {
  const auto json = parity::read_json(folder + "/layer.json");
  const auto tensors = headwise::load_safetensors(folder + "/input.safetensors").tensors;
  auto layer =
      parity::build<headwise::GroupedQueryAttention>(options_of(json), json.at("gate"), tensors);
  const auto input = [&](const char* name) { return parity::tensor(tensors, name); };
  const auto& call = json.at("call");
  if (const auto heads = get_optional<std::vector<int64_t>>(call, "heads")) {
    layer = headwise::prune(layer, {"", layer->options.num_heads(), *heads,
                                    call.at("scale").get<std::vector<double>>()});
  }
  const auto x = input("x").requires_grad_();
  std::optional<headwise::Selection> selection;
  layer->on_selection = [&](const headwise::Selection& chosen) { selection = chosen; };
  headwise::NamedTensors results;
  headwise::GroupedQueryArguments arguments{.cos = input("cos"),
                                            .sin = input("sin"),
                                            .key_padding_mask = input("key_padding_mask"),
                                            .attn_mask = input("attn_mask"),
                                            .need_weights = true};

  // In evaluation, with a cache; before the training call, which moves the gates' statistics.
  layer->eval();
  {
    const torch::NoGradGuard no_grad;
    headwise::KeyValueCache cache;
    std::vector<at::Tensor> steps, counts;
    const auto columns = [](const at::Tensor& tensor, int64_t begin, int64_t end) {
      return tensor.defined() ? tensor.slice(1, begin, end) : at::Tensor();
    };
    int64_t at = 0;
    for (const auto next : call.at("ends").get<std::vector<int64_t>>()) {
      const auto [y, none] = layer->forward(
          x.slice(1, at, next), {.cos = columns(arguments.cos, at, next),
                                 .sin = columns(arguments.sin, at, next),
                                 .key_padding_mask = columns(arguments.key_padding_mask, 0, next),
                                 .cache = &cache});
      TORCH_CHECK(!none.defined(), "weights that were not asked for");
      steps.push_back(y);
      at = next;
      if (selection) counts.push_back(selection->count);
    }
    results["steps"] = at::cat(steps, 1);
    if (!counts.empty()) results["counts"] = at::stack(counts, 1);
    results["k"] = cache.k;
    results["v"] = cache.v;
    if (cache.slots.defined()) results["slots"] = cache.slots;
  }

  layer->train(call.at("training").get<bool>());
  std::optional<headwise::GatesSee> limited;
  if (const auto seen = input("seen"); seen.defined()) {
    limited.emplace(headwise::grouped_layers(*layer), seen);
  }
  torch::manual_seed(call.at("seed").get<int64_t>());
  const auto [output, weights] = layer->forward(x, arguments);
  parity::differentiate(layer, output, weights, input("cotangent"), selection, results);
  results["grad_x"] = x.grad().defined() ? x.grad() : at::zeros_like(x);
  headwise::save_safetensors(folder + "/output.safetensors", results);
}

void prune(headwise::Model& model, const headwise::HeadPlan& plan) {
  for (const auto& entry : plan.layers()) {
    for (auto& [name, layer] : model.grouped_layers) {
      if (name != entry.name) continue;
      layer = headwise::prune(layer, entry);
      std::erase_if(model.tensors, [&](const auto& item) {
        return item.first.starts_with(entry.name + ".gate.");
      });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return parity::main(2 <= argc && argc <= 4, "decoder_parity FOLDER | FROM TO [PLAN]", [&] {
    if (argc == 2) return run(argv[1]);
    auto model = headwise::load(argv[1]);
    if (argc == 4) prune(model, headwise::HeadPlan::load(argv[3]));
    headwise::save(model, argv[2]);
  });
}

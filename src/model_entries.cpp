#include "model_entries.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "gates/options.h"

namespace headwise {
namespace {

// The kinds of layer, by the "class" of their entries; an entry without one is of the first.
constexpr const char* kMultihead = "MultiheadAttention";
constexpr const char* kGrouped = "GroupedQueryAttention";

template <class T>
T get(const Json& object, const char* key, const std::string& what) {
  const Json& value = object.at(key);
  const bool fits = std::is_same_v<T, bool>      ? value.is_boolean()
                    : std::is_same_v<T, int64_t> ? value.is_number_integer()
                                                 : value.is_number();
  TORCH_CHECK_VALUE(fits, "'", key, "' of ", what, " has the wrong type: ", shown_json(value));
  return value.get<T>();
}

/// The same, or nothing for null.
template <class T>
std::optional<T> get_optional(const Json& object, const char* key, const std::string& what) {
  return object.at(key).is_null() ? std::nullopt : std::optional(get<T>(object, key, what));
}

std::optional<GateOptions> gate_options(const Json& entry) {
  const Json& gate = entry.at("gate");
  return gate.is_null() ? std::nullopt : std::optional(gate_options_from_json(gate.dump()));
}

MultiheadAttentionOptions layer_options(const Json& entry, const std::string& what) {
  return MultiheadAttentionOptions(get<int64_t>(entry, "embed_dim", what),
                                   get<int64_t>(entry, "num_heads", what))
      .head_dim(get<int64_t>(entry, "head_dim", what))
      .kdim(get<int64_t>(entry, "kdim", what))
      .vdim(get<int64_t>(entry, "vdim", what))
      .dropout(get<double>(entry, "dropout", what))
      .bias(get<bool>(entry, "bias", what))
      .add_bias_kv(get<bool>(entry, "add_bias_kv", what))
      .add_zero_attn(get<bool>(entry, "add_zero_attn", what))
      .batch_first(get<bool>(entry, "batch_first", what))
      .gate(gate_options(entry));
}

GroupedQueryAttentionOptions grouped_options(const Json& entry, const std::string& what) {
  auto options = GroupedQueryAttentionOptions(get<int64_t>(entry, "embed_dim", what),
                                              get<int64_t>(entry, "num_heads", what))
                     .num_key_value_heads(get<int64_t>(entry, "num_key_value_heads", what))
                     .head_dim(get<int64_t>(entry, "head_dim", what))
                     .dropout(get<double>(entry, "dropout", what))
                     .bias(get<bool>(entry, "bias", what))
                     .output_bias(get<bool>(entry, "output_bias", what))
                     .scale(get<double>(entry, "scale", what))
                     .qk_norm_eps(get_optional<double>(entry, "qk_norm_eps", what))
                     .sliding_window(get_optional<int64_t>(entry, "sliding_window", what))
                     .keep_selection(get<bool>(entry, "keep_selection", what))
                     .gate(gate_options(entry));
  if (!entry.at("key_value_heads").is_null()) {
    std::vector<int64_t> heads;
    for (const Json& value : get_array(entry, "key_value_heads", what)) {
      heads.push_back(as_integer(value, "key_value_heads of " + what));
    }
    options.key_value_heads(std::move(heads));
  }
  return options;
}

/// A tensor of the layer `name` must be there, in these sizes.
const at::Tensor& expect(const NamedTensors& tensors, const std::string& key,
                         at::IntArrayRef sizes) {
  const auto found = tensors.find(key);
  TORCH_CHECK_VALUE(found != tensors.end(), kWeights, " lacks ", shown_name(key));
  TORCH_CHECK_VALUE(found->second.sizes() == sizes, shown_name(key), " has shape ",
                    found->second.sizes(), " in ", kWeights, " and ", sizes, " in ", kDescription);
  return found->second;
}

/// The gate of a layer as it is now, or null.
Json describe_gate(const std::shared_ptr<GateImpl>& gate,
                   const std::optional<GateOptions>& options) {
  if (!gate || !options) return nullptr;
  // The heads that a fixed gate keeps may have been changed since it was built.
  if (const auto* fixed = dynamic_cast<const FixedGateImpl*>(gate.get())) {
    const at::Tensor scale = fixed->scale.to(at::kCPU, at::kDouble).contiguous();
    const double* values = scale.const_data_ptr<double>();
    return gate_options_to_object(FixedGateOptions(std::get<FixedGateOptions>(*options))
                                      .heads(std::nullopt)
                                      .scale(std::vector<double>(values, values + scale.numel())));
  }
  return gate_options_to_object(*options);
}

// Sizes of a description are compared with those of the projections among the tensors before a
// layer of such sizes is made, so that a few bytes cannot ask for much memory.

void check_products(std::initializer_list<int64_t> sizes, int64_t heads, int64_t width,
                    const std::string& name) {
  constexpr int64_t kMost = int64_t{1} << 31;
  bool fits = true;
  for (const int64_t size : sizes) fits = fits && size >= 0 && size < kMost;
  TORCH_CHECK_VALUE(fits && heads * width < kMost, "sizes of ", layer_called(name),
                    " must be in 0..", kMost - 1);
}

/// A gate's hidden width must be that of one of its tensors.
void check_gate_sizes(const Json& gate, const std::string& name, const NamedTensors& tensors) {
  if (!gate.is_object()) return;
  if (gate.contains("gate")) check_gate_sizes(gate["gate"], name, tensors);
  if (!gate.contains("hidden_dim") || !gate["hidden_dim"].is_number_integer()) return;
  const auto hidden = gate["hidden_dim"].get<int64_t>();
  const bool found = std::any_of(tensors.begin(), tensors.end(), [&](const auto& named) {
    const auto sizes = named.second.sizes();
    return named.first.starts_with(join(name, "gate.")) &&
           std::find(sizes.begin(), sizes.end(), hidden) != sizes.end();
  });
  TORCH_CHECK_VALUE(found, kWeights, " has no tensor of the gate of ", layer_called(name),
                    " with hidden_dim=", hidden);
}

/// @return the type of the layer's weights
at::ScalarType check_sizes(const MultiheadAttentionOptions& o, const std::string& name,
                           const NamedTensors& tensors) {
  const int64_t d = o.embed_dim(), heads = o.num_heads(), width = o.head_dim().value_or(0);
  check_products({d, heads, width}, heads, width, name);
  const int64_t e = heads * width;
  const auto& output = expect(tensors, join(name, "out_proj.weight"), {d, e});
  const int64_t kdim = o.kdim().value_or(d), vdim = o.vdim().value_or(d);
  if (kdim == d && vdim == d) {
    expect(tensors, join(name, "in_proj_weight"), {3 * e, d});
  } else {
    expect(tensors, join(name, "q_proj_weight"), {e, d});
    expect(tensors, join(name, "k_proj_weight"), {e, kdim});
    expect(tensors, join(name, "v_proj_weight"), {e, vdim});
  }
  return output.scalar_type();
}

at::ScalarType check_sizes(const GroupedQueryAttentionOptions& o, const std::string& name,
                           const NamedTensors& tensors) {
  const int64_t d = o.embed_dim(), heads = o.num_heads(), width = o.head_dim().value_or(0);
  const int64_t groups = o.num_key_value_heads().value_or(heads);
  check_products({d, heads, width, groups}, std::max(heads, groups), width, name);
  expect(tensors, join(name, "q_proj.weight"), {heads * width, d});
  expect(tensors, join(name, "k_proj.weight"), {groups * width, d});
  expect(tensors, join(name, "v_proj.weight"), {groups * width, d});
  return expect(tensors, join(name, "o_proj.weight"), {d, heads * width}).scalar_type();
}

/// Gives the parameters and buffers of `layer` the tensors of their names, and `tensors` them.
void adopt(torch::nn::Module& layer, const std::string& name, NamedTensors& tensors) {
  for (const auto& [key, value] : state(layer)) {
    expect(tensors, join(name, key), value.sizes());
  }
  for (auto& [key, value] : state(layer)) {
    auto& found = tensors[join(name, key)];
    value.set_data(found);
    found = value;
  }
  layer.eval();
}

}  // namespace

std::vector<std::pair<std::string, at::Tensor>> state(const torch::nn::Module& layer) {
  std::vector<std::pair<std::string, at::Tensor>> found;
  for (const auto& item : layer.named_parameters()) found.emplace_back(item.key(), item.value());
  for (const auto& item : layer.named_buffers()) found.emplace_back(item.key(), item.value());
  return found;
}

Json describe(const std::string& name, const MultiheadAttentionImpl& layer) {
  const auto& options = layer.options;
  return {{"name", name},
          {"embed_dim", options.embed_dim()},
          {"num_heads", options.num_heads()},
          {"head_dim", layer.head_dim()},
          {"kdim", options.kdim().value_or(options.embed_dim())},
          {"vdim", options.vdim().value_or(options.embed_dim())},
          {"dropout", options.dropout()},
          {"bias", options.bias()},
          {"add_bias_kv", options.add_bias_kv()},
          {"add_zero_attn", options.add_zero_attn()},
          {"batch_first", options.batch_first()},
          {"gate", describe_gate(layer.gate, options.gate())}};
}

Json describe(const std::string& name, const GroupedQueryAttentionImpl& layer) {
  const auto& options = layer.options;
  const auto or_null = [](const auto& value) { return value ? Json(*value) : Json(nullptr); };
  return {{"name", name},
          {"class", kGrouped},
          {"embed_dim", options.embed_dim()},
          {"num_heads", options.num_heads()},
          {"num_key_value_heads", layer.num_key_value_heads()},
          {"head_dim", layer.head_dim()},
          {"dropout", options.dropout()},
          {"bias", layer.q_proj->bias.defined()},
          {"output_bias", layer.o_proj->bias.defined()},
          {"scale", layer.scale()},
          {"qk_norm_eps", or_null(options.qk_norm_eps())},
          {"sliding_window", or_null(options.sliding_window())},
          {"key_value_heads", or_null(options.key_value_heads())},
          {"keep_selection", options.keep_selection()},
          {"gate", describe_gate(layer.gate, options.gate())}};
}

GateImpl* read_layer(Model& model, const Json& entry, const std::string& what,
                     const at::Device& device) {
  TORCH_CHECK_VALUE(entry.is_object(), what, " must be a JSON object, got ", entry.type_name());
  Json rest = entry;
  std::string kind = kMultihead;
  if (rest.contains("class")) {
    kind = get_string(rest, "class", what);
    rest.erase("class");
  }
  TORCH_CHECK_VALUE(kind == kMultihead || kind == kGrouped, "'class' of ", what, " must be one of ",
                    kMultihead, ", ", kGrouped, ", got ", shown_name(kind));
  TORCH_CHECK_VALUE(!rest.contains("variant"), what, " is a ", shown_json(rest["variant"]),
                    ", which computes more than a ", kind, ": load the model in Python");
  if (kind == kMultihead) {
    check_keys(rest,
               {"name", "embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "bias",
                "add_bias_kv", "add_zero_attn", "batch_first", "gate"},
               what);
  } else {
    check_keys(rest,
               {"name", "embed_dim", "num_heads", "num_key_value_heads", "head_dim", "dropout",
                "bias", "output_bias", "scale", "qk_norm_eps", "sliding_window", "key_value_heads",
                "keep_selection", "gate"},
               what);
  }
  const std::string name = get_string(rest, "name", what);
  const auto add = [&](auto options, auto& layers) -> GateImpl* {
    options.device(device).dtype(check_sizes(options, name, model.tensors));
    check_gate_sizes(rest.at("gate"), name, model.tensors);
    auto& layer = layers.emplace_back(name, options).second;
    if constexpr (requires { layer->drop_bias(name); }) {
      // Attention of other libraries may have biases only in some projections.
      for (const char* projection : {"k_proj", "v_proj"}) {
        const auto bias = join(name, std::string(projection) + ".bias");
        if (options.bias() && !model.tensors.contains(bias)) layer->drop_bias(projection);
      }
    }
    adopt(*layer, name, model.tensors);
    return layer->gate.get();
  };
  return kind == kMultihead ? add(layer_options(rest, what), model.layers)
                            : add(grouped_options(rest, what), model.grouped_layers);
}

}  // namespace headwise

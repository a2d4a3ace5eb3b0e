#include "headwise/model.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <tuple>

#include "files.h"
#include "folders.h"
#include "gates/model_gates.h"
#include "headwise/version.h"
#include "json.h"

namespace headwise {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "headwise.model";
constexpr int kVersion = 1;
constexpr const char* kDescription = "headwise.json";
constexpr const char* kWeights = "model.safetensors";
constexpr size_t kLongestDescription = size_t{64} << 20;

std::string shown_name(const std::string& name) { return shown(name, 100, '\''); }

template <class T>
T get(const Json& object, const char* key, const std::string& what) {
  const Json& value = object.at(key);
  const bool fits = std::is_same_v<T, bool>      ? value.is_boolean()
                    : std::is_same_v<T, int64_t> ? value.is_number_integer()
                                                 : value.is_number();
  TORCH_CHECK_VALUE(fits, "'", key, "' of ", what, " has the wrong type: ", shown_json(value));
  return value.get<T>();
}

MultiheadAttentionOptions layer_options(const Json& entry, const std::string& what) {
  auto options = MultiheadAttentionOptions(get<int64_t>(entry, "embed_dim", what),
                                           get<int64_t>(entry, "num_heads", what))
                     .head_dim(get<int64_t>(entry, "head_dim", what))
                     .kdim(get<int64_t>(entry, "kdim", what))
                     .vdim(get<int64_t>(entry, "vdim", what))
                     .dropout(get<double>(entry, "dropout", what))
                     .bias(get<bool>(entry, "bias", what))
                     .add_bias_kv(get<bool>(entry, "add_bias_kv", what))
                     .add_zero_attn(get<bool>(entry, "add_zero_attn", what))
                     .batch_first(get<bool>(entry, "batch_first", what));
  if (const Json& gate = entry.at("gate"); !gate.is_null()) {
    options.gate(gate_options_from_json(gate.dump()));
  }
  return options;
}

Json describe(const std::string& name, const MultiheadAttentionImpl& layer) {
  const MultiheadAttentionOptions& options = layer.options;
  Json gate = nullptr;
  if (layer.gate && options.gate()) {
    GateOptions gate_options = *options.gate();
    // The heads that a fixed gate keeps may have been changed since it was built.
    if (const auto* fixed = dynamic_cast<const FixedGateImpl*>(layer.gate.get())) {
      const at::Tensor scale = fixed->scale.to(at::kCPU, at::kDouble).contiguous();
      const double* values = scale.const_data_ptr<double>();
      gate_options = FixedGateOptions(std::get<FixedGateOptions>(gate_options))
                         .heads(std::nullopt)
                         .scale(std::vector<double>(values, values + scale.numel()));
    }
    gate = Json::parse(gate_options_to_json(gate_options));
  }
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
          {"gate", std::move(gate)}};
}

/// A layer's parameters and buffers, by their names within it.
std::vector<std::pair<std::string, at::Tensor>> state(const MultiheadAttention& layer) {
  std::vector<std::pair<std::string, at::Tensor>> found;
  for (const auto& item : layer->named_parameters()) found.emplace_back(item.key(), item.value());
  for (const auto& item : layer->named_buffers()) found.emplace_back(item.key(), item.value());
  return found;
}

std::string join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

/// Every parameter and buffer of `layer` must be among `tensors`, in its shape.
void check_fits(const MultiheadAttention& layer, const std::string& name,
                const NamedTensors& tensors) {
  for (const auto& [key, value] : state(layer)) {
    const auto found = tensors.find(join(name, key));
    TORCH_CHECK_VALUE(found != tensors.end(), kWeights, " lacks ", shown_name(join(name, key)));
    TORCH_CHECK_VALUE(found->second.sizes() == value.sizes(), shown_name(found->first),
                      " has shape ", found->second.sizes(), " in ", kWeights, " and ",
                      value.sizes(), " in ", kDescription);
  }
}

/// The sizes of a description must be those of the projections among `tensors`: compared before a
/// layer of such sizes is made, so that a few bytes cannot ask for much memory.
void check_sizes(const Json& entry, const MultiheadAttentionOptions& o, const std::string& name,
                 const NamedTensors& tensors) {
  const auto expect = [&](const std::string& key, std::vector<int64_t> sizes) {
    const auto found = tensors.find(join(name, key));
    TORCH_CHECK_VALUE(found != tensors.end(), kWeights, " lacks ", shown_name(join(name, key)));
    TORCH_CHECK_VALUE(found->second.sizes() == at::IntArrayRef(sizes), shown_name(found->first),
                      " has shape ", found->second.sizes(), " in ", kWeights, " and ",
                      at::IntArrayRef(sizes), " in ", kDescription);
  };
  constexpr int64_t kMost = int64_t{1} << 31;
  const int64_t d = o.embed_dim(), heads = o.num_heads(), width = o.head_dim().value_or(0);
  TORCH_CHECK_VALUE(d >= 0 && d < kMost && heads >= 0 && heads < kMost && width >= 0 &&
                        width < kMost && heads * width < kMost,
                    "sizes of layer ", shown_name(name), " must be in 0..", kMost - 1);
  const int64_t e = heads * width;
  expect("out_proj.weight", {d, e});
  const int64_t kdim = o.kdim().value_or(d), vdim = o.vdim().value_or(d);
  if (kdim == d && vdim == d) {
    expect("in_proj_weight", {3 * e, d});
  } else {
    expect("q_proj_weight", {e, d});
    expect("k_proj_weight", {e, kdim});
    expect("v_proj_weight", {e, vdim});
  }
  const Json& gate = entry.at("gate");
  if (!gate.is_object() || !gate.contains("hidden_dim") ||
      !gate["hidden_dim"].is_number_integer()) {
    return;
  }
  const auto hidden = gate["hidden_dim"].get<int64_t>();
  const bool found = std::any_of(tensors.begin(), tensors.end(), [&](const auto& named) {
    const auto sizes = named.second.sizes();
    return named.first.starts_with(join(name, "gate.")) &&
           std::find(sizes.begin(), sizes.end(), hidden) != sizes.end();
  });
  TORCH_CHECK_VALUE(found, kWeights, " has no tensor of the gate of ", shown_name(name),
                    " with hidden_dim=", hidden);
}

/// Gives the parameters and buffers of `layer` the tensors of their names, and `tensors` them.
void adopt(const MultiheadAttention& layer, const std::string& name, NamedTensors& tensors) {
  for (auto& [key, value] : state(layer)) {
    const auto found = tensors.find(join(name, key));
    value.set_data(found->second);
    found->second = value;
  }
}

/// The tensors with each tied one listed once, and the names that the others refer to.
std::pair<NamedTensors, std::map<std::string, std::string>> unique(const NamedTensors& tensors) {
  using Key = std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>>;
  std::map<Key, std::string> first;
  NamedTensors kept;
  std::map<std::string, std::string> aliases;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(tensor.defined(), "tensors must be defined, got an undefined one at '", name,
                      "'");
    const Key key{tensor.const_data_ptr(), tensor.scalar_type(), tensor.sizes().vec(),
                  tensor.strides().vec()};
    const auto [found, is_new] = first.emplace(key, name);
    if (is_new || tensor.numel() == 0) {
      kept.emplace(name, tensor.detach());
    } else {
      aliases.emplace(name, found->second);
    }
  }
  return {std::move(kept), std::move(aliases)};
}

bool may_replace(const std::string& folder) {
  return is_regular_file(folder + "/" + kDescription) || is_empty_folder(folder);
}

/// The gates of a layer that put heads to sleep, by the names that Python gives their layers.
std::vector<std::pair<std::string, SleepGateImpl*>> sleeping(const std::string& name,
                                                             const MultiheadAttention& layer) {
  std::vector<std::pair<std::string, SleepGateImpl*>> found;
  for (const auto& item : layer->named_modules("", /*include_self=*/false)) {
    auto* gate = dynamic_cast<SleepGateImpl*>(item.value().get());
    if (gate == nullptr) continue;
    std::string key = join(name, item.key());
    if (key == "gate") {
      key.clear();
    } else if (key.ends_with(".gate")) {
      key.resize(key.size() - 5);
    }
    found.emplace_back(key, gate);
  }
  return found;
}

void restore_moves(const Model& model, const Json& moves, const std::string& what) {
  std::map<std::string, std::pair<SleepGateImpl*, std::vector<HeadMove>>> own;
  for (const auto& [name, layer] : model.layers) {
    for (const auto& [key, gate] : sleeping(name, layer)) own[key].first = gate;
  }
  for (const Json& entry : moves) {
    check_keys(entry, {"layer", "step", "progress", "head", "event", "score"}, what);
    TORCH_CHECK_VALUE(entry["progress"].is_number() && entry["score"].is_number(),
                      "progress and score of ", what, " must be numbers");
    const std::string event = get_string(entry, "event", what);
    TORCH_CHECK_VALUE(event == "sleeps" || event == "wakes", "event of ", what,
                      " must be \"sleeps\" or \"wakes\", got ", shown_name(event));
    const std::string layer = get_string(entry, "layer", what);
    const int64_t head = as_integer(entry["head"], "head of " + what);
    const auto found = own.find(layer);
    TORCH_CHECK_VALUE(found != own.end() && head >= 0 && head < found->second.first->num_heads(),
                      what, " names head ", head, " of layer ", shown_name(layer),
                      ", which no SleepGate of the model has");
    found->second.second.push_back({as_integer(entry["step"], "step of " + what),
                                    entry["progress"].get<double>(), 0, head, event == "wakes",
                                    entry["score"].get<double>()});
  }
  for (const auto& [key, gate] : own) gate.first->set_moves(gate.second);
}

Json all_moves(const Model& model) {
  Json found = Json::array();
  for (const auto& [name, layer] : model.layers) {
    for (const auto& [key, gate] : sleeping(name, layer)) {
      for (const HeadMove& move : gate->moves()) {
        found.push_back({{"layer", key},
                         {"step", move.step},
                         {"progress", move.progress},
                         {"head", move.head},
                         {"event", move.wakes ? "wakes" : "sleeps"},
                         {"score", move.score}});
      }
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Json& a, const Json& b) {
    return a["step"].get<int64_t>() < b["step"].get<int64_t>();
  });
  return found;
}

/// Removes a folder at the end of a scope, if it is still there.
struct Removal {
  std::string path;
  ~Removal() { remove_folder(path); }
};

}  // namespace

const MultiheadAttention& Model::layer(const std::string& name) const {
  for (const auto& [key, layer] : layers) {
    if (key == name) return layer;
  }
  TORCH_CHECK_INDEX(false, "the model has no attention layer '", name, "'");
}

const at::Tensor& Model::tensor(const std::string& name) const {
  const auto found = tensors.find(name);
  TORCH_CHECK_INDEX(found != tensors.end(), "the model has no tensor '", name, "'");
  return found->second;
}

Model load(const std::string& dir, const at::Device& device) {
  const std::string path = (fs::path(dir) / kDescription).string();
  const std::string what = shown_path(path);
  Json document = parse_json(read_file(path, kLongestDescription), what);
  check_format(document, kFormat, kVersion, what);
  Json structure;
  if (document.contains("structure")) {
    structure = std::move(document["structure"]);
    document.erase("structure");
    TORCH_CHECK_VALUE(structure.is_object(), "'structure' of ", what, " must be an object");
  }
  Json moves = Json::array();
  if (document.contains("moves")) {
    moves = std::move(document["moves"]);
    document.erase("moves");
    TORCH_CHECK_VALUE(moves.is_array(), "'moves' of ", what, " must be a list");
  }
  check_keys(document,
             {"format", "version", "headwise_version", "architecture", "layers", "aliases"}, what);
  TORCH_CHECK_VALUE(document["architecture"].is_object(), "'architecture' of ", what,
                    " must be an object");
  TORCH_CHECK_VALUE(document["layers"].is_array(), "'layers' of ", what, " must be a list");
  TORCH_CHECK_VALUE(document["aliases"].is_object(), "'aliases' of ", what, " must be an object");

  Model model;
  model.architecture = document["architecture"].dump();
  if (!structure.is_null()) model.structure = structure.dump();
  model.tensors = load_safetensors((fs::path(dir) / kWeights).string()).tensors;
  for (auto& [name, tensor] : model.tensors) tensor = tensor.to(device);
  std::set<std::string> names;
  for (size_t i = 0; i < document["layers"].size(); ++i) {
    const Json& entry = document["layers"][i];
    const std::string where = "layer " + std::to_string(i) + " of " + what;
    check_keys(entry,
               {"name", "embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "bias",
                "add_bias_kv", "add_zero_attn", "batch_first", "gate"},
               where);
    const std::string name = get_string(entry, "name", where);
    TORCH_CHECK_VALUE(names.insert(name).second, "layers of ", what,
                      " must have unique names, got ", shown_name(name), " twice");
    auto options = layer_options(entry, where).device(device);
    const auto weight = model.tensors.find(join(name, "out_proj.weight"));
    TORCH_CHECK_VALUE(weight != model.tensors.end(), kWeights, " lacks ",
                      shown_name(join(name, "out_proj.weight")));
    options.dtype(weight->second.scalar_type());
    check_sizes(entry, options, name, model.tensors);
    MultiheadAttention layer(options);
    check_fits(layer, name, model.tensors);
    adopt(layer, name, model.tensors);
    layer->eval();
    model.layers.emplace_back(name, layer);
  }
  std::vector<GateImpl*> gates;
  for (const auto& [name, layer] : model.layers) {
    if (layer->gate) gates.push_back(layer->gate.get());
  }
  link_gates(gates);
  restore_moves(model, moves, "'moves' of " + what);
  for (const auto& [alias, target] : document["aliases"].items()) {
    const auto found =
        target.is_string() ? model.tensors.find(target.get<std::string>()) : model.tensors.end();
    TORCH_CHECK_VALUE(found != model.tensors.end(), "aliases of ", what, " name ",
                      shown_json(target), ", which is missing");
    model.tensors[alias] = found->second;
  }
  return model;
}

void save(const Model& model, const std::string& dir) {
  Json layers = Json::array();
  NamedTensors tensors = model.tensors;
  std::set<std::string> names;
  for (const auto& [name, layer] : model.layers) {
    TORCH_CHECK_VALUE(names.insert(name).second, "layers must have unique names, got ",
                      shown_name(name), " twice");
    layers.push_back(describe(name, *layer));
    for (const auto& [key, value] : state(layer)) tensors[join(name, key)] = value;
  }
  const auto [kept, aliases] = unique(tensors);
  const Json architecture = parse_json(model.architecture, "architecture");
  TORCH_CHECK_VALUE(architecture.is_object(), "architecture must be a JSON object");
  Json document = {{"format", kFormat},
                   {"version", kVersion},
                   {"headwise_version", version()},
                   {"architecture", architecture},
                   {"layers", std::move(layers)}};
  if (!model.structure.empty()) {
    document["structure"] = parse_json(model.structure, "structure");
    TORCH_CHECK_VALUE(document["structure"].is_object(), "structure must be a JSON object");
  }
  if (Json moves = all_moves(model); !moves.empty()) document["moves"] = std::move(moves);
  document["aliases"] = Json(aliases);

  fs::path absolute = fs::absolute(dir).lexically_normal();
  if (!absolute.has_filename()) absolute = absolute.parent_path();  // "folder/"
  const std::string target = through_links(absolute.string());
  TORCH_CHECK_VALUE(!exists(target) || may_replace(target),
                    "dir must not exist, be empty, or be a folder that headwise.save wrote, got ",
                    shown_path(target));
  create_folders(fs::path(target).parent_path().string());
  const Removal beside{folder_beside(target)};
  save_safetensors(beside.path + "/" + kWeights, kept);
  write_atomic(beside.path + "/" + kDescription, document.dump(1) + "\n");
  replace_folder(beside.path, target);
}

}  // namespace headwise

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
#include "model_entries.h"
#include "shown.h"

namespace headwise {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "headwise.model";
constexpr int kVersion = 1;
constexpr size_t kLongestDescription = size_t{64} << 20;

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

/// Calls use(name, layer) for the layers of both kinds.
template <typename Use>
void for_each_layer(const Model& model, Use&& use) {
  for (const auto& [name, layer] : model.layers) use(name, *layer);
  for (const auto& [name, layer] : model.grouped_layers) use(name, *layer);
}

template <typename Layers>
const auto& find_layer(const Layers& layers, const std::string& name) {
  for (const auto& [key, layer] : layers) {
    if (key == name) return layer;
  }
  TORCH_CHECK_INDEX(false, "the model has no attention layer ", shown_name(name));
}

/// The gates of a layer that put heads to sleep, by the names that Python gives their layers.
std::vector<std::pair<std::string, SleepGateImpl*>> sleeping(const std::string& name,
                                                             const torch::nn::Module& layer) {
  std::vector<std::pair<std::string, SleepGateImpl*>> found;
  for (const auto& item : layer.named_modules("", /*include_self=*/false)) {
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
  for_each_layer(model, [&](const std::string& name, const auto& layer) {
    for (const auto& [key, gate] : sleeping(name, layer)) own[key].first = gate;
  });
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
                      what, " names head ", head, " of ", layer_called(layer),
                      ", which no SleepGate of the model has");
    found->second.second.push_back({as_integer(entry["step"], "step of " + what),
                                    entry["progress"].get<double>(), 0, head, event == "wakes",
                                    entry["score"].get<double>()});
  }
  for (const auto& [key, gate] : own) gate.first->set_moves(gate.second);
}

Json all_moves(const Model& model) {
  Json found = Json::array();
  for_each_layer(model, [&](const std::string& name, const auto& layer) {
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
  });
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
  return find_layer(layers, name);
}

const GroupedQueryAttention& Model::grouped_layer(const std::string& name) const {
  return find_layer(grouped_layers, name);
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
  std::vector<GateImpl*> gates;
  for (size_t i = 0; i < document["layers"].size(); ++i) {
    const Json& entry = document["layers"][i];
    const std::string where = "layer " + std::to_string(i) + " of " + what;
    auto* gate = read_layer(model, entry, where, device);
    const auto name = entry["name"].get<std::string>();
    TORCH_CHECK_VALUE(names.insert(name).second, "layers of ", what,
                      " must have unique names, got ", shown_name(name), " twice");
    if (gate == nullptr) continue;
    const auto within = gates_in(*gate);
    gates.insert(gates.end(), within.begin(), within.end());
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
  for_each_layer(model, [&](const std::string& name, const auto& layer) {
    TORCH_CHECK_VALUE(names.insert(name).second, "layers must have unique names, got ",
                      shown_name(name), " twice");
    layers.push_back(describe(name, layer));
    for (const auto& [key, value] : state(layer)) tensors[join(name, key)] = value;
  });
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

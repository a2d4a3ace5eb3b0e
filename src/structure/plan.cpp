#include <c10/util/Exception.h>

#include <unordered_set>
#include <utility>

#include "files.h"
#include "headwise/structure.h"
#include "json.h"
#include "structure/units.h"

namespace headwise {
namespace {

constexpr const char* kFormat = "headwise.structure";
constexpr int kVersion = 1;
constexpr size_t kMaxFile = size_t{1} << 28;

std::vector<int64_t> get_integers(const Json& object, const char* key, const std::string& what) {
  std::vector<int64_t> numbers;
  const std::string named = shown(key) + " of " + what;
  for (const Json& value : get_array(object, key, what)) {
    numbers.push_back(as_integer(value, named));
  }
  return numbers;
}

void check_ffn(const FfnPlan& plan) {
  const std::string what = "plan of feed-forward network " + shown(plan.name);
  TORCH_CHECK_VALUE(plan.num_neurons >= 0, "num_neurons in ", what, " must not be negative, got ",
                    plan.num_neurons);
  check_units(plan.neurons, plan.scale, plan.num_neurons, "neurons", what);
}

void check_hidden(const HiddenPlan& plan) {
  const std::string what = "plan of the hidden dimensions";
  check_units(plan.dimensions, plan.scale, plan.size, "dimensions", what);
  TORCH_CHECK_VALUE(!plan.dimensions.empty(), "dimensions in ", what,
                    " must not be empty: at least one must stay");
}

}  // namespace

StructurePlan::StructurePlan(HeadPlan heads, std::vector<FfnPlan> ffn,
                             std::vector<BlockPlan> blocks, std::optional<HiddenPlan> hidden,
                             std::string metadata)
    : heads_(std::move(heads)),
      ffn_(std::move(ffn)),
      blocks_(std::move(blocks)),
      hidden_(std::move(hidden)),
      metadata_(std::move(metadata)) {
  std::unordered_set<std::string> names, scaled, gone;
  for (const BlockPlan& block : blocks_) {
    const std::string name = shown(block.name);
    TORCH_CHECK_VALUE(scaled.insert(block.name).second, "blocks of a plan must have different ",
                      "names, got ", name, " twice");
    TORCH_CHECK_VALUE(std::isfinite(block.scale), "scale of block ", name, " must be finite, got ",
                      block.scale);
    if (block.scale == 0.0) gone.insert(block.name);
  }
  const auto check_gone = [&](const std::string& name, size_t left, const char* kind) {
    TORCH_CHECK_VALUE(left == 0 || !gone.contains(name), "block ", shown(name),
                      " has scale 0, so it must have no ", kind, " left, got ", left);
  };
  for (const FfnPlan& plan : ffn_) {
    TORCH_CHECK_VALUE(names.insert(plan.name).second, "feed-forward networks of a plan must have ",
                      "different names, got ", shown(plan.name), " twice");
    check_ffn(plan);
    check_gone(plan.name, plan.neurons.size(), "neurons");
  }
  for (const LayerPlan& layer : heads_.layers()) {
    check_gone(layer.name, layer.heads.size(), "heads");
  }
  if (hidden_) check_hidden(*hidden_);
  const Json document = parse_json(metadata_, "metadata of a plan");
  TORCH_CHECK_VALUE(document.is_object(), "metadata of a plan must be a JSON object, got ",
                    document.type_name());
  metadata_ = document.dump();
}

double StructurePlan::block_scale(const std::string& name) const {
  for (const BlockPlan& block : blocks_) {
    if (block.name == name) return block.scale;
  }
  return 1.0;
}

int64_t StructurePlan::num_neurons() const {
  int64_t count = 0;
  for (const FfnPlan& plan : ffn_) count += plan.num_neurons;
  return count;
}

int64_t StructurePlan::neurons_kept() const {
  int64_t count = 0;
  for (const FfnPlan& plan : ffn_) count += static_cast<int64_t>(plan.neurons.size());
  return count;
}

std::string StructurePlan::to_json(int indent) const {
  Json ffn = Json::array(), blocks = Json::array(), hidden = nullptr;
  for (const FfnPlan& plan : ffn_) {
    ffn.push_back({{"name", plan.name},
                   {"num_neurons", plan.num_neurons},
                   {"neurons", plan.neurons},
                   {"scale", plan.scale}});
  }
  for (const BlockPlan& block : blocks_) {
    blocks.push_back({{"name", block.name}, {"scale", block.scale}});
  }
  if (hidden_) {
    hidden = {
        {"size", hidden_->size}, {"dimensions", hidden_->dimensions}, {"scale", hidden_->scale}};
  }
  const Json document = {{"format", kFormat},
                         {"version", kVersion},
                         {"heads", Json::parse(heads_.to_json(-1))},
                         {"ffn", std::move(ffn)},
                         {"blocks", std::move(blocks)},
                         {"hidden", std::move(hidden)},
                         {"metadata", Json::parse(metadata_)}};
  return document.dump(indent);
}

StructurePlan StructurePlan::from_json(const std::string& text) {
  const std::string what = "structure plan";
  const Json document = parse_json(text, what);
  if (document.is_object() && document.value("format", Json()) == "headwise.plan") {
    return StructurePlan(HeadPlan::from_json(text));
  }
  check_format(document, kFormat, kVersion, what);
  check_keys(document, {"format", "version", "heads", "ffn", "blocks", "hidden", "metadata"}, what);
  std::vector<FfnPlan> ffn;
  for (const Json& entry : get_array(document, "ffn", what)) {
    const std::string where = "network " + std::to_string(ffn.size()) + " of " + what;
    check_keys(entry, {"name", "num_neurons", "neurons", "scale"}, where);
    ffn.push_back({get_string(entry, "name", where),
                   as_integer(entry["num_neurons"], "\"num_neurons\" of " + where),
                   get_integers(entry, "neurons", where), get_numbers(entry, "scale", where)});
  }
  std::vector<BlockPlan> blocks;
  for (const Json& entry : get_array(document, "blocks", what)) {
    const std::string where = "block " + std::to_string(blocks.size()) + " of " + what;
    check_keys(entry, {"name", "scale"}, where);
    TORCH_CHECK_VALUE(entry["scale"].is_number(), "\"scale\" of ", where, " must be a number, got ",
                      shown_json(entry["scale"]));
    blocks.push_back({get_string(entry, "name", where), entry["scale"].get<double>()});
  }
  std::optional<HiddenPlan> hidden;
  if (const Json& entry = document["hidden"]; !entry.is_null()) {
    const std::string where = "hidden of " + what;
    check_keys(entry, {"size", "dimensions", "scale"}, where);
    hidden =
        HiddenPlan{as_integer(entry["size"], "\"size\" of " + where),
                   get_integers(entry, "dimensions", where), get_numbers(entry, "scale", where)};
  }
  return StructurePlan(HeadPlan::from_json(document["heads"].dump()), std::move(ffn),
                       std::move(blocks), std::move(hidden), document["metadata"].dump());
}

void StructurePlan::save(const std::string& path) const { write_atomic(path, to_json() + "\n"); }

StructurePlan StructurePlan::load(const std::string& path) {
  return from_json(read_file(path, kMaxFile));
}

}  // namespace headwise

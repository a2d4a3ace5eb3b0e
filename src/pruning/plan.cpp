#include "headwise/pruning.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>

#include "files.h"
#include "json.h"

namespace headwise {
namespace {

constexpr const char* kFormat = "headwise.plan";
constexpr int kVersion = 1;
constexpr size_t kMaxFile = size_t{1} << 28;

void check_layer(const LayerPlan& layer) {
  const std::string what = "plan of " + layer_called(layer.name);
  TORCH_CHECK_VALUE(layer.num_heads >= 0, "num_heads in ", what, " must not be negative, got ",
                    layer.num_heads);
  for (size_t i = 0; i < layer.heads.size(); ++i) {
    TORCH_CHECK_VALUE(layer.heads[i] >= 0 && layer.heads[i] < layer.num_heads, "heads in ", what,
                      " must be between 0 and ", layer.num_heads - 1, ", got ", layer.heads[i]);
    TORCH_CHECK_VALUE(i == 0 || layer.heads[i] > layer.heads[i - 1], "heads in ", what,
                      " must be ascending and different, got ", layer.heads[i], " after ",
                      layer.heads[i - 1]);
  }
  TORCH_CHECK_VALUE(layer.scale.size() == layer.heads.size(), "scale in ", what,
                    " must have a number for each of its ", layer.heads.size(), " heads, got ",
                    layer.scale.size());
  for (const double scale : layer.scale) {
    TORCH_CHECK_VALUE(std::isfinite(scale), "scale in ", what, " must be finite, got ", scale);
  }
}

/// round(keep * heads), at least one.
int64_t kept_of(double keep, int64_t heads) {
  if (heads == 0) return 0;
  return std::clamp<int64_t>(std::llround(keep * static_cast<double>(heads)), 1, heads);
}

struct Ranked {
  double score;  // larger = more important
  size_t layer;
  int64_t head;
};

/// Most important first; ties by layer, then head.
std::vector<Ranked> ranked(const HeadScores& scores) {
  // Of this metric alone, small values mean important heads: broad attention carries little
  // information.
  const double sign = scores.metric == "entropy" ? -1.0 : 1.0;
  std::vector<Ranked> heads;
  for (size_t layer = 0; layer < scores.values.size(); ++layer) {
    const auto& values = scores.values[layer];
    for (size_t head = 0; head < values.size(); ++head) {
      TORCH_CHECK_VALUE(std::isfinite(values[head]), "scores must be finite, got ", values[head],
                        " for head ", head, " of ", layer_called(scores.layers[layer]));
      heads.push_back({sign * values[head], layer, static_cast<int64_t>(head)});
    }
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [](const Ranked& a, const Ranked& b) { return a.score > b.score; });
  return heads;
}

/// Rows of the kept heads in each of `parts` projections stacked in dimension `dim`.
at::Tensor select_heads_of(const at::Tensor& parameter, int64_t dim, int64_t parts,
                           const LayerPlan& layer, const std::string& name) {
  TORCH_CHECK_VALUE(parameter.defined() && parameter.dim() > dim, name, " must have at least ",
                    dim + 1, " dimensions, got ", parameter.defined() ? parameter.dim() : 0);
  const int64_t size = parameter.size(dim);
  const int64_t stacked = parts * layer.num_heads;
  TORCH_CHECK_VALUE(stacked == 0 ? size == 0 : size % stacked == 0, "size ", dim, " of ", name,
                    " must be a multiple of ", parts, " x ", layer.num_heads, " heads, got ", size);
  const int64_t head_dim = stacked == 0 ? 1 : size / stacked;
  const auto kept = at::tensor(layer.heads, at::TensorOptions(at::kLong)).to(parameter.device());
  // [.., parts, H, d, ..] -> the kept of H -> [.., parts h d, ..]
  return parameter.unflatten(dim, {parts, layer.num_heads, head_dim})
      .index_select(dim + 1, kept)
      .flatten(dim, dim + 2);
}

at::Tensor prune_output(const at::Tensor& weight, const LayerPlan& layer, const std::string& name) {
  at::Tensor kept = select_heads_of(weight, 1, 1, layer, name);  // [D, h d]
  if (std::all_of(layer.scale.begin(), layer.scale.end(), [](double s) { return s == 1.0; })) {
    return kept;
  }
  const int64_t head_dim = kept.size(1) / static_cast<int64_t>(layer.heads.size());
  // In float64, so that a scale is rounded once, with the product.
  const at::Tensor scale = at::tensor(layer.scale, at::TensorOptions(at::kDouble))
                               .repeat_interleave(head_dim)
                               .to(weight.device());  // [h d]
  return (kept.to(at::kDouble) * scale).to(weight.scalar_type());
}

}  // namespace

HeadPlan::HeadPlan(std::vector<LayerPlan> layers, std::string metric, std::string metadata)
    : layers_(std::move(layers)), metric_(std::move(metric)), metadata_(std::move(metadata)) {
  std::unordered_set<std::string> names;
  for (const LayerPlan& layer : layers_) {
    TORCH_CHECK_VALUE(names.insert(layer.name).second, "layers of a plan must have different ",
                      "names, got ", shown(layer.name), " twice");
    check_layer(layer);
  }
  const Json document = parse_json(metadata_, "metadata of a plan");
  TORCH_CHECK_VALUE(document.is_object(), "metadata of a plan must be a JSON object, got ",
                    document.type_name());
  metadata_ = document.dump();
}

int64_t HeadPlan::num_heads() const {
  int64_t count = 0;
  for (const LayerPlan& layer : layers_) count += layer.num_heads;
  return count;
}

int64_t HeadPlan::heads_kept() const {
  int64_t count = 0;
  for (const LayerPlan& layer : layers_) count += static_cast<int64_t>(layer.heads.size());
  return count;
}

std::string HeadPlan::to_json(int indent) const {
  Json layers = Json::array();
  for (const LayerPlan& layer : layers_) {
    layers.push_back({{"name", layer.name},
                      {"num_heads", layer.num_heads},
                      {"heads", layer.heads},
                      {"scale", layer.scale}});
  }
  const Json document = {{"format", kFormat},
                         {"version", kVersion},
                         {"metric", metric_},
                         {"layers", std::move(layers)},
                         {"metadata", Json::parse(metadata_)}};
  return document.dump(indent);
}

HeadPlan HeadPlan::from_json(const std::string& text) {
  const Json document = parse_json(text, "plan");
  check_format(document, kFormat, kVersion, "plan");
  check_keys(document, {"format", "version", "metric", "layers", "metadata"}, "plan");
  std::vector<LayerPlan> layers;
  for (const Json& entry : get_array(document, "layers", "plan")) {
    const std::string what = "layer " + std::to_string(layers.size()) + " of plan";
    check_keys(entry, {"name", "num_heads", "heads", "scale"}, what);
    LayerPlan layer;
    layer.name = get_string(entry, "name", what);
    layer.num_heads = as_integer(entry["num_heads"], "\"num_heads\" of " + what);
    for (const Json& head : get_array(entry, "heads", what)) {
      layer.heads.push_back(as_integer(head, "\"heads\" of " + what));
    }
    layer.scale = get_numbers(entry, "scale", what);
    layers.push_back(std::move(layer));
  }
  return HeadPlan(std::move(layers), get_string(document, "metric", "plan"),
                  document["metadata"].dump());
}

void HeadPlan::save(const std::string& path) const { write_atomic(path, to_json() + "\n"); }

HeadPlan HeadPlan::load(const std::string& path) { return from_json(read_file(path, kMaxFile)); }

HeadPlan plan(const HeadScores& scores, double keep, int64_t min_heads_per_layer, Scope scope) {
  TORCH_CHECK_VALUE(keep > 0.0 && keep <= 1.0, "keep must be in (0, 1], got ", keep);
  TORCH_CHECK_VALUE(min_heads_per_layer >= 0, "min_heads_per_layer must not be negative, got ",
                    min_heads_per_layer);
  const bool of_model = scope == Scope::model;
  const size_t layers = scores.layers.size();
  TORCH_CHECK_VALUE(scores.values.size() == layers, "scores must have values for each of their ",
                    layers, " layers, got ", scores.values.size());
  std::vector<LayerPlan> result(layers);
  std::vector<int64_t> reserved(layers);  // heads the layer keeps whatever their rank
  std::vector<int64_t> room(layers);      // heads it may keep
  int64_t total = 0, least = 0;
  for (size_t i = 0; i < layers; ++i) {
    result[i].name = scores.layers[i];
    const auto heads = static_cast<int64_t>(scores.values[i].size());
    result[i].num_heads = heads;
    reserved[i] = std::min(min_heads_per_layer, heads);
    room[i] = of_model ? heads : kept_of(keep, heads);
    TORCH_CHECK_VALUE(reserved[i] <= room[i], "min_heads_per_layer=", min_heads_per_layer,
                      " is more than keep=", keep, " leaves of ", layer_called(result[i].name),
                      ", which is ", room[i]);
    total += heads;
    least += reserved[i];
  }
  TORCH_CHECK_VALUE(total > 0, "scores must be of at least one head, got none");
  int64_t budget = of_model ? kept_of(keep, total) : total;
  TORCH_CHECK_VALUE(least <= budget, "min_heads_per_layer=", min_heads_per_layer, " asks for ",
                    least, " heads, more than keep=", keep, " leaves, which is ", budget);

  // A head outside its layer's reserve must leave enough of the budget for all other reserves.
  int64_t outstanding = least;
  for (const Ranked& candidate : ranked(scores)) {
    auto& heads = result[candidate.layer].heads;
    const auto taken = static_cast<int64_t>(heads.size());
    const bool is_reserved = taken < reserved[candidate.layer];
    if (taken >= room[candidate.layer] || (!is_reserved && budget <= outstanding)) continue;
    heads.push_back(candidate.head);
    --budget;
    if (is_reserved) --outstanding;
  }
  for (LayerPlan& layer : result) {
    std::sort(layer.heads.begin(), layer.heads.end());
    layer.scale.assign(layer.heads.size(), 1.0);
  }
  const Json metadata = {{"keep", keep},
                         {"min_heads_per_layer", min_heads_per_layer},
                         {"scope", of_model ? "model" : "layer"}};
  return HeadPlan(std::move(result), scores.metric, metadata.dump());
}

NamedTensors prune_projections(const NamedTensors& parameters, const LayerPlan& layer) {
  check_layer(layer);
  const c10::NoGradGuard no_grad;
  NamedTensors pruned;
  for (const auto& [name, parameter] : parameters) {
    if (name == "in_proj_weight" || name == "in_proj_bias") {
      pruned[name] = select_heads_of(parameter, 0, 3, layer, name);
    } else if (name == "q_proj_weight" || name == "k_proj_weight" || name == "v_proj_weight") {
      pruned[name] = select_heads_of(parameter, 0, 1, layer, name);
    } else if (name == "bias_k" || name == "bias_v") {
      pruned[name] = select_heads_of(parameter, 2, 1, layer, name);
    } else if (name == "out_proj.weight") {
      pruned[name] = prune_output(parameter, layer, name);
    } else if (name == "out_proj.bias") {
      pruned[name] = parameter.clone();
    } else {
      TORCH_CHECK_VALUE(false, "parameters must be those of an attention layer, got ", shown(name));
    }
  }
  return pruned;
}

}  // namespace headwise

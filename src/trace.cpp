#include "headwise/trace.h"

#include <ATen/ATen.h>

#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "shown.h"

namespace headwise {
namespace {

using Json = nlohmann::ordered_json;

/// The heads that ran for each input, as a set of bits: `heads` of them, over all layers.
struct HeadSets {
  int64_t heads = 0;
  std::vector<std::vector<uint64_t>> inputs;
};

at::Tensor to_host(const at::Tensor& tensor) { return tensor.to(at::kCPU).contiguous(); }

/// Adds a layer's calls to `sets`, whose heads so far are the layers before it.
void add_layer(const std::string& name, int64_t num_heads, const std::vector<Selection>& calls,
               HeadSets& sets) {
  const size_t words = (sets.heads + num_heads + 63) / 64;
  size_t input = 0;
  for (const Selection& call : calls) {
    const at::Tensor index = to_host(call.index);  // [B, H]
    const at::Tensor count = to_host(call.count);  // [B]
    const int32_t* row = index.const_data_ptr<int32_t>();
    for (int64_t b = 0; b < count.numel(); ++b, ++input, row += num_heads) {
      if (input == sets.inputs.size()) sets.inputs.emplace_back();
      sets.inputs[input].resize(words, 0);
      const int32_t chosen = count.const_data_ptr<int32_t>()[b];
      TORCH_CHECK_VALUE(0 <= chosen && chosen <= num_heads, "count of ", layer_called(name),
                        " must be between 0 and ", num_heads, ", got ", chosen);
      for (int32_t i = 0; i < chosen; ++i) {
        TORCH_CHECK_VALUE(0 <= row[i] && row[i] < num_heads, "index of ", layer_called(name),
                          " must be between 0 and ", num_heads - 1, ", got ", row[i]);
        const int64_t bit = sets.heads + row[i];
        sets.inputs[input][bit / 64] |= uint64_t{1} << (bit % 64);
      }
    }
  }
  sets.heads += num_heads;
}

TraceSummary summarise(const HeadSets& sets) {
  TraceSummary summary;
  const size_t inputs = sets.inputs.size();
  summary.sequences = static_cast<int64_t>(inputs);
  if (inputs == 0) return summary;

  double sum = 0, sum_of_squares = 0;
  for (const auto& set : sets.inputs) {
    int64_t heads = 0;
    for (const uint64_t word : set) heads += std::popcount(word);
    const double fraction = sets.heads == 0 ? 0.0 : static_cast<double>(heads) / sets.heads;
    summary.mean_heads += static_cast<double>(heads) / inputs;
    sum += fraction;
    sum_of_squares += fraction * fraction;
  }
  summary.mean_fraction = sum / inputs;
  summary.std_fraction = std::sqrt(
      std::max(0.0, sum_of_squares / inputs - summary.mean_fraction * summary.mean_fraction));
  if (inputs < 2) return summary;

  double distance = 0;
  for (size_t a = 0; a < inputs; ++a) {
    for (size_t b = a + 1; b < inputs; ++b) {
      int64_t both = 0, either = 0;
      for (size_t w = 0; w < sets.inputs[a].size(); ++w) {
        both += std::popcount(sets.inputs[a][w] & sets.inputs[b][w]);
        either += std::popcount(sets.inputs[a][w] | sets.inputs[b][w]);
      }
      if (either > 0) distance += 1.0 - static_cast<double>(both) / either;
    }
  }
  summary.mean_jaccard_distance = distance / (0.5 * inputs * (inputs - 1));
  return summary;
}

Json to_json(const std::optional<TraceSummary>& summary) {
  if (!summary) return nullptr;
  return {{"sequences", summary->sequences},
          {"mean_heads", summary->mean_heads},
          {"mean_fraction", summary->mean_fraction},
          {"std_fraction", summary->std_fraction},
          {"mean_jaccard_distance",
           summary->mean_jaccard_distance ? Json(*summary->mean_jaccard_distance) : Json(nullptr)}};
}

Json numbers(const float* values, int64_t size) {
  Json array = Json::array();
  for (int64_t i = 0; i < size; ++i) array.push_back(values[i]);
  return array;
}

/// One call: a list with one object per sequence.
Json to_json(const Selection& call, int64_t num_heads) {
  const auto as_float = [](const at::Tensor& tensor) {
    return tensor.defined() ? to_host(tensor.to(at::kFloat)) : at::Tensor();
  };
  const at::Tensor index = to_host(call.index), count = to_host(call.count);  // [B, H], [B]
  const at::Tensor weight = as_float(call.weight);                            // [B, H]
  const at::Tensor relevance = as_float(call.relevance);                      // [B, H]
  const at::Tensor budget = as_float(call.budget);                            // [B]
  Json sequences = Json::array();
  for (int64_t b = 0; b < count.numel(); ++b) {
    Json heads = Json::array(), weights = Json::array();
    for (int32_t i = 0; i < count.const_data_ptr<int32_t>()[b]; ++i) {
      const int32_t head = index.const_data_ptr<int32_t>()[b * num_heads + i];
      heads.push_back(head);
      weights.push_back(weight.const_data_ptr<float>()[b * num_heads + head]);
    }
    sequences.push_back(
        {{"heads", std::move(heads)},
         {"weight", std::move(weights)},
         {"relevance", relevance.defined()
                           ? numbers(relevance.const_data_ptr<float>() + b * num_heads, num_heads)
                           : Json(nullptr)},
         {"budget", budget.defined() ? Json(budget.const_data_ptr<float>()[b]) : Json(nullptr)}});
  }
  return sequences;
}

void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ",
                    tensor.sizes());
}

}  // namespace

void Trace::record(const std::string& layer, int64_t num_heads, const Selection& selection) {
  for (const auto& [name, tensor] :
       {std::pair{"index", selection.index}, std::pair{"count", selection.count}}) {
    TORCH_CHECK_VALUE(tensor.defined(), name, " of a selection must be given");
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, name, " must be int32, got ",
                     tensor.scalar_type());
  }
  TORCH_CHECK_VALUE(selection.weight.defined(), "weight of a selection must be given");
  TORCH_CHECK_VALUE(selection.count.dim() == 1, "count must have shape [B], got ",
                    selection.count.sizes());
  const int64_t batch = selection.count.size(0);
  check_shape("index", selection.index, {batch, num_heads});
  check_shape("weight", selection.weight, {batch, num_heads});
  if (selection.relevance.defined())
    check_shape("relevance", selection.relevance, {batch, num_heads});
  if (selection.budget.defined()) check_shape("budget", selection.budget, {batch});

  const auto found = layers_.find(layer);
  TORCH_CHECK_VALUE(found == layers_.end() || found->second.num_heads == num_heads, "num_heads of ",
                    layer_called(layer), " must stay ",
                    found == layers_.end() ? num_heads : found->second.num_heads, ", got ",
                    num_heads);
  if (found == layers_.end()) order_.push_back(layer);
  Layer& entry = layers_.try_emplace(layer, Layer{num_heads, {}}).first->second;
  // Copies: a gate may hand out a view of a buffer that it changes later.
  const auto copy = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.detach().clone(at::MemoryFormat::Contiguous) : at::Tensor();
  };
  entry.calls.push_back({copy(selection.index), copy(selection.count), copy(selection.weight),
                         copy(selection.relevance), copy(selection.budget)});
}

const Trace::Layer& Trace::layer(const std::string& name) const {
  const auto found = layers_.find(name);
  TORCH_CHECK_INDEX(found != layers_.end(), "no selection was recorded for ", layer_called(name));
  return found->second;
}

int64_t Trace::num_heads(const std::string& name) const { return layer(name).num_heads; }

const std::vector<Selection>& Trace::history(const std::string& name) const {
  return layer(name).calls;
}

TraceSummary Trace::summary(const std::string& name) const {
  const Layer& entry = layer(name);
  HeadSets sets;
  add_layer(name, entry.num_heads, entry.calls, sets);
  return summarise(sets);
}

std::optional<TraceSummary> Trace::summary() const {
  HeadSets sets;
  std::optional<int64_t> inputs;
  for (const std::string& name : order_) {
    const Layer& entry = layers_.at(name);
    int64_t seen = 0;
    for (const Selection& call : entry.calls) seen += call.count.size(0);
    if (inputs && *inputs != seen) return std::nullopt;
    inputs = seen;
    add_layer(name, entry.num_heads, entry.calls, sets);
  }
  if (!inputs) return std::nullopt;
  return summarise(sets);
}

std::string Trace::to_json(int indent) const {
  Json layers = Json::array();
  for (const std::string& name : order_) {
    const Layer& entry = layers_.at(name);
    const TraceSummary spread = summary(name);  // checks index and count, which calls rely on
    Json calls = Json::array();
    for (const Selection& call : entry.calls) {
      calls.push_back(headwise::to_json(call, entry.num_heads));
    }
    layers.push_back({{"name", name},
                      {"num_heads", entry.num_heads},
                      {"summary", headwise::to_json(spread)},
                      {"calls", std::move(calls)}});
  }
  const Json document = {{"format", "headwise.trace"},
                         {"version", 1},
                         {"summary", headwise::to_json(summary())},
                         {"layers", std::move(layers)}};
  return document.dump(indent);
}

void Trace::clear() {
  order_.clear();
  layers_.clear();
}

}  // namespace headwise

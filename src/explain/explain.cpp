// explain(): records one forward and repeats it with each head toggled.
#include <ATen/ATen.h>

#include <algorithm>

#include "explain/numbers.h"
#include "headwise/explain.h"
#include "headwise/instrument.h"
#include "ops/gates/selection_ops.h"

namespace headwise {
namespace {

/// Weights of one layer's heads that are given in advance, call by call.
struct Held {
  std::vector<at::Tensor> weights;  ///< of each call in a forward
  size_t next = 0;

  Selection selection(int64_t inputs, const at::TensorOptions& like) {
    TORCH_CHECK_VALUE(
        next < weights.size(),
        "forward_fn must call each layer the same number of times for every input: one was ",
        "called more than ", weights.size(), " times");
    const at::Tensor weight = weights[next++].to(like);  // [N, H]
    TORCH_CHECK_VALUE(weight.size(0) == inputs, "forward_fn must run the ", weight.size(0),
                      " inputs that rows names, got ", inputs);
    const auto [index, count] = select_nonzero(weight);
    return {index, count, weight, {}, {}};
  }
};

NamedTensors tensors_of(const GateImpl& gate) {
  NamedTensors tensors;
  for (const auto& item : gate.named_parameters()) tensors[item.key()] = item.value();
  for (const auto& item : gate.named_buffers()) tensors[item.key()] = item.value();
  return tensors;
}

}  // namespace

std::string explain(const AttentionLayers& layers, int64_t batch,
                    const std::function<at::Tensor(const at::Tensor& rows)>& forward_fn,
                    const ExplainOptions& options,
                    const std::vector<std::vector<std::string>>& tokens,
                    const std::vector<std::string>& labels) {
  TORCH_CHECK_VALUE(batch > 0, "batch must be positive, got ", batch);
  TORCH_CHECK_VALUE(options.batch_size() > 0, "batch_size must be positive, got ",
                    options.batch_size());
  const at::NoGradGuard no_grad;
  Instrumented opened(layers);
  Explanation explanation(options);
  std::vector<size_t> site_layer;  // the layer of each site
  opened.probe_with([&](size_t i, const AttentionProbe& probe) {
    const MultiheadAttention& called = layers[i].second;
    const bool gated = called->gate && called->options.gate();
    explanation.add_layer(layers[i].first, called->options.num_heads(),
                          gated ? gate_options_to_json(*called->options.gate()) : "",
                          gated ? tensors_of(*called->gate) : NamedTensors{}, probe);
    site_layer.push_back(i);
  });
  const at::Tensor logits = forward_fn(at::arange(batch));
  TORCH_CHECK_VALUE(!site_layer.empty(), "forward_fn must call the layers: none was called");
  explanation.set_inputs({}, tokens);
  if (logits.defined()) explanation.set_prediction(logits, labels);
  if (!logits.defined() || !options.effects()) return explanation.to_json();

  opened.stop_probing();
  std::vector<Held> held(layers.size());
  opened.override_with([&](size_t i, int64_t inputs, const at::TensorOptions& like, const Choose&) {
    return held[i].selection(inputs, like);
  });
  for (int64_t input = 0; input < batch; ++input) {
    for (int64_t begin = 0; begin < explanation.num_heads(); begin += options.batch_size()) {
      const int64_t end = std::min(begin + options.batch_size(), explanation.num_heads());
      const auto weights = explanation.switched(input, begin, end);
      for (Held& each : held) each = {};
      for (size_t site = 0; site < weights.size(); ++site) {
        held[site_layer[site]].weights.push_back(weights[site]);
      }
      explanation.add_effects(input, begin, forward_fn(at::full({end - begin}, input, at::kLong)));
    }
  }
  return explanation.to_json();
}

}  // namespace headwise

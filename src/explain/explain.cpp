// explain(): records one forward and repeats it with each head switched over.
#include <ATen/ATen.h>

#include <algorithm>

#include "explain/numbers.h"
#include "gates/selection_ops.h"
#include "headwise/explain.h"

namespace headwise {
namespace {

/// Gives a layer, call by call, weights that were decided beforehand. The heads attend as with the
/// gate that it takes the place of.
class HeldGate : public GateImpl {
 public:
  HeldGate(int64_t embed_dim, int64_t num_heads, std::shared_ptr<GateImpl> gate)
      : GateImpl("headwise::HeldGate", embed_dim, num_heads, "selected"), gate_(std::move(gate)) {}

  Selection forward(const at::Tensor& x, const at::Tensor&) override {
    return next_selection(x.size(0), x.options());
  }

  bool attends() const override { return gate_ && gate_->attends(); }
  bool reads_heads() const override { return attends(); }
  Selection forward_heads(const HeadInputs& heads) override {
    return next_selection(heads.q.size(0), heads.q.options());
  }
  at::Tensor attend(const HeadInputs& heads, const at::Tensor& v) override {
    return gate_->attend(heads, v);
  }

  std::vector<at::Tensor> weights;  ///< of each call in a forward
  size_t next = 0;

 private:
  Selection next_selection(int64_t batch, const at::TensorOptions& options) {
    TORCH_CHECK_VALUE(next < weights.size(),
                      "forward must call the layers as often for every input: a layer was called "
                      "more than ",
                      weights.size(), " times");
    const at::Tensor weight = weights[next++].to(options);  // [N, H]
    TORCH_CHECK_VALUE(weight.size(0) == batch, "forward must run the ", weight.size(0),
                      " inputs that rows names, got ", batch);
    const auto [index, count] = select_nonzero(weight);
    return {index, count, weight, {}, {}};
  }

  std::shared_ptr<GateImpl> gate_;  // not a submodule: it is the layer's
};

using Layers = std::vector<std::pair<std::string, MultiheadAttention>>;

/// Takes recorders and held gates out of the layers again, whatever happens.
class Restore {
 public:
  explicit Restore(const Layers& layers) : layers_(layers) {
    for (const auto& [name, layer] : layers) saved_.emplace_back(layer->gate, layer->probe);
  }
  ~Restore() {
    for (size_t i = 0; i < layers_.size(); ++i) {
      layers_[i].second.ptr()->gate = saved_[i].first;
      layers_[i].second.ptr()->probe = saved_[i].second;
    }
  }
  Restore(const Restore&) = delete;
  Restore& operator=(const Restore&) = delete;

 private:
  const Layers& layers_;
  std::vector<std::pair<std::shared_ptr<GateImpl>, std::function<void(const AttentionProbe&)>>>
      saved_;
};

NamedTensors tensors_of(const GateImpl& gate) {
  NamedTensors tensors;
  for (const auto& item : gate.named_parameters()) tensors[item.key()] = item.value();
  for (const auto& item : gate.named_buffers()) tensors[item.key()] = item.value();
  return tensors;
}

}  // namespace

std::string explain(const Layers& layers, int64_t batch,
                    const std::function<at::Tensor(const at::Tensor& rows)>& forward,
                    const ExplainOptions& options,
                    const std::vector<std::vector<std::string>>& tokens,
                    const std::vector<std::string>& labels) {
  TORCH_CHECK_VALUE(batch > 0, "batch must be positive, got ", batch);
  TORCH_CHECK_VALUE(options.batch_size() > 0, "batch_size must be positive, got ",
                    options.batch_size());
  const at::NoGradGuard no_grad;
  const Restore restore(layers);
  Explanation explanation(options);
  std::vector<size_t> site_layer;  // the layer of each site
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].second.ptr()->probe = [&, i](const AttentionProbe& probe) {
      const MultiheadAttention& called = layers[i].second;
      const bool gated = called->gate && called->options.gate();
      explanation.add_layer(layers[i].first, called->options.num_heads(),
                            gated ? gate_options_to_json(*called->options.gate()) : "",
                            gated ? tensors_of(*called->gate) : NamedTensors{}, probe);
      site_layer.push_back(i);
    };
  }
  const at::Tensor logits = forward(at::arange(batch));
  TORCH_CHECK_VALUE(!site_layer.empty(), "forward must call the layers: none was called");
  explanation.set_inputs({}, tokens);
  if (logits.defined()) explanation.set_prediction(logits, labels);
  if (!logits.defined() || !options.effects()) return explanation.to_json();

  std::vector<std::shared_ptr<HeldGate>> held;
  for (const auto& [name, layer] : layers) {
    held.push_back(std::make_shared<HeldGate>(layer->options.embed_dim(),
                                              layer->options.num_heads(), layer.ptr()->gate));
    layer.ptr()->probe = nullptr;
    layer.ptr()->gate = held.back();
  }
  for (int64_t input = 0; input < batch; ++input) {
    for (int64_t begin = 0; begin < explanation.num_heads(); begin += options.batch_size()) {
      const int64_t end = std::min(begin + options.batch_size(), explanation.num_heads());
      const auto weights = explanation.switched(input, begin, end);
      for (const auto& gate : held) gate->weights.clear(), gate->next = 0;
      for (size_t site = 0; site < weights.size(); ++site) {
        held[site_layer[site]]->weights.push_back(weights[site]);
      }
      explanation.add_effects(input, begin, forward(at::full({end - begin}, input, at::kLong)));
    }
  }
  return explanation.to_json();
}

}  // namespace headwise

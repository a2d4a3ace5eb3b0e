#include "headwise/instrument.h"

#include <ATen/ATen.h>

#include "headwise/selection.h"

namespace headwise {

namespace {

/// Replaces a layer's gate; it passes on what it does not decide itself.
class OverriddenGate : public GateImpl {
 public:
  OverriddenGate(const MultiheadAttentionImpl& layer, size_t place, Override fn)
      : GateImpl("headwise::OverriddenGate", layer.options.embed_dim(), layer.options.num_heads(),
                 /*run_all=*/false),
        gate_(layer.gate),
        place_(place),
        fn_(std::move(fn)) {}

  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask) override {
    const at::TensorOptions like = x.options().requires_grad(false);
    return fn_(place_, x.size(0), like, [&] {
      return gate_ ? gate_->forward(x, key_padding_mask) : select_all(x.size(0), num_heads(), like);
    });
  }
  bool reads_heads() const override { return gate_ && gate_->reads_heads(); }
  Selection forward_heads(const HeadInputs& heads) override {
    const at::TensorOptions like = heads.q.options().requires_grad(false);
    return fn_(place_, heads.q.size(0), like, [&] { return gate_->forward_heads(heads); });
  }
  bool attends() const override { return gate_ && gate_->attends(); }
  at::Tensor attend(const HeadInputs& heads, const at::Tensor& v) override {
    return gate_->attend(heads, v);
  }

 private:
  std::shared_ptr<GateImpl> gate_;  // not a submodule: it is the layer's
  size_t place_;
  Override fn_;
};

}  // namespace

Instrumented::Instrumented(AttentionLayers layers) : layers_(std::move(layers)) {
  for (const auto& [name, layer] : layers_) {
    before_.push_back({layer->gate, layer->probe, layer->probe_context});
  }
}

Instrumented::~Instrumented() {
  stop_probing();
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].second->gate = before_[i].gate;
}

void Instrumented::override_with(Override fn) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    MultiheadAttentionImpl& layer = *layers_[i].second;
    layer.gate = std::make_shared<OverriddenGate>(layer, i, fn);
  }
}

void Instrumented::probe_with(const Probe& fn, bool context) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    layers_[i].second->probe = [fn, i](const AttentionProbe& probe) { fn(i, probe); };
    layers_[i].second->probe_context = context;
  }
}

void Instrumented::stop_probing() {
  for (size_t i = 0; i < layers_.size(); ++i) {
    layers_[i].second->probe = before_[i].probe;
    layers_[i].second->probe_context = before_[i].probe_context;
  }
}

}  // namespace headwise

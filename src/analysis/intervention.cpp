#include "analysis/intervention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "gates/selection_ops.h"
#include "headwise/selection.h"

namespace headwise {

AttentionLayers attention_layers(torch::nn::Module& model) {
  AttentionLayers found;
  if (dynamic_cast<MultiheadAttentionImpl*>(&model) != nullptr) {
    found.emplace_back("",
                       std::dynamic_pointer_cast<MultiheadAttentionImpl>(model.shared_from_this()));
  }
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto layer = std::dynamic_pointer_cast<MultiheadAttentionImpl>(item.value())) {
      found.emplace_back(item.key(), MultiheadAttention(std::move(layer)));
    }
  }
  return found;
}

namespace analysis {
namespace {

/// What a layer's own gate chooses, changed. The heads attend as with that gate.
class ChangedGate : public GateImpl {
 public:
  ChangedGate(const MultiheadAttentionImpl& layer, Change change)
      : GateImpl("headwise::ChangedGate", layer.options.embed_dim(), layer.options.num_heads(),
                 "selected"),
        gate_(layer.gate),
        change_(std::move(change)) {}

  Selection forward(const at::Tensor& x, const at::Tensor& key_padding_mask) override {
    return change_(gate_ ? gate_->forward(x, key_padding_mask)
                         : select_all(x.size(0), num_heads(), x.options().requires_grad(false)));
  }
  bool reads_heads() const override { return gate_ && gate_->reads_heads(); }
  Selection forward_heads(const HeadInputs& heads) override {
    return change_(gate_->forward_heads(heads));
  }
  bool attends() const override { return gate_ && gate_->attends(); }
  at::Tensor attend(const HeadInputs& heads, const at::Tensor& v) override {
    return gate_->attend(heads, v);
  }

 private:
  std::shared_ptr<GateImpl> gate_;  // not a submodule: it is the layer's
  Change change_;
};

}  // namespace

Intervention::Intervention(const AttentionLayers& layers, std::vector<Change> changes)
    : layers_(layers) {
  for (const auto& [name, layer] : layers_) gates_.push_back(layer->gate);
  for (size_t i = 0; i < layers_.size(); ++i) {
    MultiheadAttentionImpl& layer = *layers_[i].second;
    layer.gate = std::make_shared<ChangedGate>(layer, std::move(changes[i]));
  }
}

Intervention::~Intervention() {
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].second->gate = gates_[i];
}

Selection scaled(const Selection& selection, const at::Tensor& factor) {
  Selection changed = selection;
  changed.weight = selection.weight * factor.to(selection.weight.options());  // [B, H]
  if (factor.requires_grad()) return changed;
  std::tie(changed.index, changed.count) = select_nonzero(changed.weight);
  return changed;
}

namespace {

std::vector<Change> scalings(const AttentionLayers& layers, std::vector<at::Tensor>& factors) {
  std::vector<Change> changes;
  for (size_t i = 0; i < layers.size(); ++i) {
    factors.push_back(at::ones({layers[i].second->options.num_heads()},
                               layers[i].second->out_proj->weight.options().requires_grad(false)));
    changes.push_back([&factors, i](const Selection& s) { return scaled(s, factors[i]); });
  }
  return changes;
}

}  // namespace

ScaledHeads::ScaledHeads(const AttentionLayers& layers)
    : intervention_(layers, scalings(layers, factors)) {}

at::Tensor example_losses(int64_t batches, const BatchLoss& loss) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> found;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const at::Tensor losses = loss(batch);
    TORCH_CHECK_VALUE(losses.defined() && losses.dim() == 1,
                      "loss must return one loss an example [B], got ",
                      losses.defined() ? c10::str("shape ", losses.sizes()) : "no tensor");
    found.push_back(losses.to(at::kCPU, at::kDouble));
  }
  const at::Tensor losses = found.empty() ? at::empty({0}, at::kDouble) : at::cat(found);
  TORCH_CHECK_VALUE(losses.numel() > 0,
                    "batches must not be empty: there is nothing to measure heads on");
  TORCH_CHECK_VALUE(at::isfinite(losses).all().item<bool>(),
                    "loss must return a finite loss, got NaN or infinity");
  return losses;
}

}  // namespace analysis
}  // namespace headwise

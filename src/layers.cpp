#include "headwise/layers.h"

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

}  // namespace headwise

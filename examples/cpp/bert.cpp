// Runs a BERT classifier that Python trained and headwise.save wrote, and prints which heads ran.
//
//   python examples/python/train_gate.py FOLDER          writes the model and a batch of texts
//   headwise_example_bert FOLDER [INPUTS] [OUTPUTS]
//
// INPUTS (default FOLDER/batch.safetensors) holds input_ids and attention_mask, int64 [B, L], as
// the tokenizer made them; OUTPUTS, if given, gets logits, float [B, labels].
#include <headwise/model.h>
#include <torch/torch.h>

#include <iostream>
#include <map>
#include <string>

namespace {

/// What is around the attention of BERT (Devlin et al. 2019, arXiv 1810.04805), with the defaults
/// of its configuration: gelu, layer norm with 1e-12.
class Bert {
 public:
  explicit Bert(headwise::Model model) : model_(std::move(model)) {}

  /// ids, mask: int64 [B, L], mask 0 at padding -> logits [B, labels]
  at::Tensor logits(const at::Tensor& ids, const at::Tensor& mask) {
    const std::string embeddings = "bert.embeddings.";
    at::Tensor x = at::embedding(get(embeddings + "word_embeddings.weight"), ids) +
                   get(embeddings + "position_embeddings.weight").slice(0, 0, ids.size(1)) +
                   get(embeddings + "token_type_embeddings.weight")[0];  // [B, L, D]
    x = norm(x, embeddings + "LayerNorm");
    const at::Tensor padding = mask == 0;  // [B, L]
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      const std::string layer = "bert.encoder.layer." + std::to_string(i) + ".";
      auto [name, attention] = model_.layers[i];
      attention->on_selection = [&chosen = chosen_[name]](const headwise::Selection& selection) {
        chosen = selection;
      };
      const auto [y, weights] = attention->forward(x, x, x, padding, /*need_weights=*/false);
      x = norm(y + x, layer + "attention.output.LayerNorm");
      const at::Tensor hidden = at::gelu(linear(x, layer + "intermediate.dense"));
      x = norm(linear(hidden, layer + "output.dense") + x, layer + "output.LayerNorm");
    }
    const at::Tensor pooled = at::tanh(linear(x.select(1, 0), "bert.pooler.dense"));  // [B, D]
    return linear(pooled, "classifier");
  }

  /// Which heads each layer ran for each text of the last batch.
  void print_selections() const {
    for (const auto& [name, layer] : model_.layers) {
      std::cout << name << ":";
      if (!layer->gate) std::cout << " no gate, all " << layer->options.num_heads();
      const auto& selection = chosen_.at(name);
      for (int64_t b = 0; layer->gate && b < selection.count.size(0); ++b) {
        const int64_t count = selection.count[b].item<int64_t>();
        std::cout << (b ? " |" : "");
        for (int64_t i = 0; i < count; ++i) {
          std::cout << " " << selection.index[b][i].item<int64_t>();
        }
      }
      std::cout << "\n";
    }
  }

 private:
  const at::Tensor& get(const std::string& name) const { return model_.tensor(name); }
  at::Tensor linear(const at::Tensor& x, const std::string& name) const {
    // A feed-forward block that was pruned away has no bias.
    const auto bias = model_.tensors.find(name + ".bias");
    if (bias == model_.tensors.end()) return at::linear(x, get(name + ".weight"));
    return at::linear(x, get(name + ".weight"), bias->second);
  }
  // A removed block took the norm on its sum with it.
  at::Tensor norm(const at::Tensor& x, const std::string& name) const {
    if (!model_.tensors.contains(name + ".weight")) return x;
    return at::layer_norm(x, {x.size(-1)}, get(name + ".weight"), get(name + ".bias"), 1e-12);
  }

  headwise::Model model_;
  std::map<std::string, headwise::Selection> chosen_;  // by layer, for the last batch
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::cerr << "usage: " << argv[0] << " FOLDER [INPUTS.safetensors] [OUTPUTS.safetensors]\n";
    return 2;
  }
  const std::string folder = argv[1];
  try {
    const torch::NoGradGuard no_grad;
    const std::string inputs = argc > 2 ? argv[2] : folder + "/batch.safetensors";
    const auto batch = headwise::load_safetensors(inputs).tensors;
    for (const char* name : {"input_ids", "attention_mask"}) {
      TORCH_CHECK(batch.contains(name), "'", inputs, "' must have a tensor '", name, "'");
    }
    Bert bert(headwise::load(folder));
    const at::Tensor logits = bert.logits(batch.at("input_ids"), batch.at("attention_mask"));
    bert.print_selections();
    std::cout << "logits:\n" << logits << "\n";
    if (argc > 3) headwise::save_safetensors(argv[3], {{"logits", logits}});
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}

// Generates with a decoder of the Llama architecture that Python converted, gated or pruned and
// headwise.save wrote, and prints which groups of heads ran: the tokens are those of Python.
//
//   headwise_example_decoder FOLDER NEW TOKEN [TOKEN ...]
//
// NEW is how many tokens to generate; the TOKENs are the prompt's numbers, as the model's tokenizer
// makes them in Python (this program has none).
#include <headwise/headwise.h>
#include <torch/torch.h>

#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace {

/// What is around the attention of Llama (Touvron et al. 2023, arXiv 2302.13971).
class Llama {
 public:
  explicit Llama(headwise::Model model)
      : model_(std::move(model)), caches_(model_.grouped_layers.size()) {
    const auto architecture = nlohmann::json::parse(model_.architecture);
    TORCH_CHECK_VALUE(architecture.at("class") == "LlamaForCausalLM",
                      "the folder must hold a LlamaForCausalLM, got ",
                      architecture.at("class").get<std::string>());
    const auto& config = architecture.at("config");
    const auto& rope = config.at("rope_parameters");
    TORCH_CHECK_VALUE(rope.at("rope_type") == "default" && config.at("hidden_act") == "silu",
                      "the model must have plain rotary positions and silu, got ",
                      rope.at("rope_type").get<std::string>(), " and ",
                      config.at("hidden_act").get<std::string>());
    eps_ = config.at("rms_norm_eps").get<double>();
    theta_ = rope.at("rope_theta").get<double>();
  }

  /// ids: int64 [1, L], the tokens after those of earlier calls -> logits of the next one [V]
  at::Tensor logits(const at::Tensor& ids) {
    at::Tensor x = at::embedding(model_.tensor("model.embed_tokens.weight"), ids);  // [1, L, D]
    const int64_t width = model_.grouped_layers[0].second->head_dim();
    const auto kind = x.options().dtype(at::kFloat);
    const auto angle = at::arange(length_, length_ + ids.size(1), kind).unsqueeze(1) *
                       at::pow(theta_, at::arange(0, width, 2, kind) / -double(width));
    const auto both = at::cat({angle, angle}, -1).unsqueeze(0);  // [1, L, d]
    const auto cos = both.cos().to(x.scalar_type()), sin = both.sin().to(x.scalar_type());
    for (size_t i = 0; i < model_.grouped_layers.size(); ++i) {
      auto [name, attention] = model_.grouped_layers[i];
      attention->on_selection = [&chosen = chosen_[name]](const headwise::Selection& selection) {
        chosen.push_back(selection);
      };
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      const auto [y, weights] = attention->forward(norm(x, layer + "input_layernorm"),
                                                   {.cos = cos, .sin = sin, .cache = &caches_[i]});
      x = x + y;
      const auto h = norm(x, layer + "post_attention_layernorm");
      x = x +
          linear(at::silu(linear(h, layer + "mlp.gate_proj")) * linear(h, layer + "mlp.up_proj"),
                 layer + "mlp.down_proj");
    }
    length_ += ids.size(1);
    return linear(norm(x, "model.norm").select(1, -1), "lm_head")[0];
  }

  /// The groups that each layer ran, call by call.
  void print_groups() const {
    for (const auto& [name, layer] : model_.grouped_layers) {
      const int64_t groups = layer->num_key_value_heads();
      std::cout << name << ":";
      if (!layer->gate) std::cout << " no gate, all " << groups << " groups";
      const auto of = torch::tensor(layer->head_groups(), at::kLong);
      for (size_t call = 0; layer->gate && call < chosen_.at(name).size(); ++call) {
        const auto& selection = chosen_.at(name)[call];
        const auto heads =
            headwise::selection_mask(selection.index, selection.count, at::kLong)[0];  // [H]
        const auto ran = at::zeros({groups}, at::kLong).index_add(0, of, heads);
        std::cout << (call ? " |" : "");
        for (int64_t group = 0; group < groups; ++group) {
          if (ran[group].item<int64_t>() > 0) std::cout << " " << group;
        }
      }
      std::cout << "\n";
    }
  }

 private:
  at::Tensor norm(const at::Tensor& x, const std::string& name) const {
    return at::rms_norm(x, {x.size(-1)}, model_.tensor(name + ".weight"), eps_);
  }
  at::Tensor linear(const at::Tensor& x, const std::string& name) const {
    const auto bias = model_.tensors.find(name + ".bias");
    return at::linear(x, model_.tensor(name + ".weight"),
                      bias == model_.tensors.end() ? at::Tensor() : bias->second);
  }

  headwise::Model model_;
  std::vector<headwise::KeyValueCache> caches_;  // of each layer
  std::map<std::string, std::vector<headwise::Selection>> chosen_;
  int64_t length_ = 0;
  double eps_, theta_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr
        << "usage: " << argv[0] << " FOLDER NEW TOKEN [TOKEN ...]\n"
        << "NEW: how many tokens to generate; TOKEN: the numbers of the prompt's tokens (this "
           "program has no tokenizer)\n";
    return 2;
  }
  try {
    const torch::NoGradGuard no_grad;
    std::vector<int64_t> ids;
    for (int i = 3; i < argc; ++i) ids.push_back(std::stoll(argv[i]));
    Llama llama(headwise::load(argv[1]));
    at::Tensor next = torch::tensor(ids, at::kLong).unsqueeze(0);  // [1, L]
    std::cout << "tokens:";
    for (int64_t left = std::stoll(argv[2]); left > 0; --left) {
      next = llama.logits(next).argmax().reshape({1, 1});
      std::cout << " " << next.item<int64_t>();
    }
    std::cout << "\n";
    llama.print_groups();
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}

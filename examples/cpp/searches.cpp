// Which heads of a model of one's own matter, and how few are enough: scores, a plan by them,
// and a budget that follows the confidence of the prediction.
#include <headwise/headwise.h>
#include <torch/torch.h>

#include <iostream>

/// Two attention layers, each added to its input, and a classifier of the mean.
struct ClassifierImpl : torch::nn::Module {
  ClassifierImpl() {
    for (auto* layer : {&first, &second}) {
      *layer = headwise::MultiheadAttention(
          headwise::MultiheadAttentionOptions(32, 4).batch_first(true));
    }
    register_module("first", first);
    register_module("second", second);
    register_module("head", head);
  }

  at::Tensor forward(at::Tensor x) {  // [B, L, D] -> [B, classes]
    for (auto& layer : {first, second}) x = x + std::get<0>(layer.ptr()->forward(x, x, x));
    return head(x.mean(1));
  }

  headwise::MultiheadAttention first{nullptr}, second{nullptr};
  torch::nn::Linear head{32, 3};
};
TORCH_MODULE(Classifier);

int main() {
  torch::manual_seed(0);
  Classifier model;
  model->eval();
  const auto x = torch::randn({64, 10, 32});
  const auto labels = model(x).argmax(1);

  const auto layers = headwise::attention_layers(*model);
  const auto loss_fn = [&](int64_t batch) {  // of each of 32 examples
    const auto rows = torch::arange(32 * batch, 32 * batch + 32);
    return at::cross_entropy_loss(model(x.index_select(0, rows)), labels.index_select(0, rows), {},
                                  at::Reduction::None);
  };
  const auto scores = headwise::score_heads(layers, 2, loss_fn, {"michel", "entropy"});
  const auto plan = headwise::plan(scores.at("michel"), /*keep=*/0.5);
  std::cout << plan.to_json() << "\n";

  headwise::ConfidencePolicy policy(
      layers, headwise::ConfidencePolicyOptions().ranking(scores.at("michel")));
  const headwise::PolicyBatch batch{
      64, [&](const at::Tensor& rows) { return model(x.index_select(0, rows)); }, labels};
  const auto fitted = policy.fit_accuracy({batch}, /*loss=*/0.05);
  std::cout << fitted.heads << " heads on average, accuracy " << fitted.accuracy << "\n"
            << policy.predict(batch).reason(0) << "\n";
}

// clone(), reset() and pretty_print() of layers and gates, as of LibTorch's own modules.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>
#include <string>
#include <vector>

#include "checks.h"
#include "headwise/multihead_attention.h"

namespace test_clone {

using namespace headwise;

constexpr int64_t kDim = 12, kHeads = 3;

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  explicit NetImpl(std::optional<GateOptions> gate_) : gate(std::move(gate_)) { NetImpl::reset(); }
  void reset() override {
    layers.clear();
    for (int i = 0; i < 2; ++i) {
      layers.emplace_back(MultiheadAttentionOptions(kDim, kHeads).batch_first(true).gate(gate));
      register_module("layer" + std::to_string(i), layers.back());
    }
    head = register_module("head", torch::nn::Linear(kDim, 2));
  }
  // clone() replaces what the registered layers hold, not the holders.
  at::Tensor forward(at::Tensor x) {
    for (auto& layer : layers) {
      x = x + std::get<0>(layer->forward(x, x, x, {}, /*need_weights=*/false));
    }
    return head(x);
  }
  GateImpl& gate_of(size_t layer) { return *layers[layer]->gate; }

  std::optional<GateOptions> gate;
  std::vector<MultiheadAttention> layers;
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Net);

Net clone_of(const Net& net) { return Net(std::dynamic_pointer_cast<NetImpl>(net->clone())); }

std::vector<GateOptions> gates() {
  return {
      FixedGateOptions().heads(std::vector<int64_t>{0, 2}),
      RandomGateOptions().keep(0.5).per_input(false),
      BudgetGateOptions().keep(0.5),
      HardConcreteGateOptions().keep(0.5),
      GumbelSigmoidGateOptions().keep(0.5),
      SubsetGateOptions().keep(0.5),
      RequestedBudgetGateOptions(),
      SleepGateOptions().every(1),
      ThresholdGateOptions().threshold(1.0),
      SharedHeadsGateOptions().shared(std::vector<int64_t>{1}).gate(BudgetGateOptions().keep(0.5))};
}

void fill_with_noise(torch::nn::Module& module) {
  torch::NoGradGuard no_grad;
  for (auto& parameter : module.parameters()) parameter.normal_();
}

std::string printed(const torch::nn::Module& module) {
  std::ostringstream stream;
  stream << module;
  return stream.str();
}

TEST(Clone, ComputesTheSameAndSharesNothing) {
  std::vector<std::optional<GateOptions>> all{std::nullopt};
  for (const auto& gate : gates()) all.emplace_back(gate);
  for (const auto& gate : all) {
    torch::manual_seed(0);
    Net net(gate);
    link_gates(*net);
    fill_with_noise(*net);
    const auto x = torch::randn({4, 5, kDim});
    for (int i = 0; i < 2; ++i) net->forward(x).sum().backward();
    net->layers[1]->in_proj_weight.set_requires_grad(false);
    net->eval();
    Net copy = clone_of(net);
    SCOPED_TRACE(printed(*net));
    EXPECT_EQ(printed(*copy), printed(*net));
    EXPECT_FALSE(copy->is_training());
    const auto expected = net->forward(x);
    EXPECT_TRUE(torch::equal(copy->forward(x), expected));

    const auto own = copy->named_parameters();
    for (const auto& item : net->named_parameters()) {
      EXPECT_FALSE(own[item.key()].is_alias_of(item.value())) << item.key();
      EXPECT_EQ(own[item.key()].requires_grad(), item.value().requires_grad()) << item.key();
      EXPECT_FALSE(own[item.key()].grad().defined()) << item.key();
    }
    const auto buffers = copy->named_buffers();
    for (const auto& item : net->named_buffers()) {
      EXPECT_FALSE(buffers[item.key()].numel() > 0 && buffers[item.key()].is_alias_of(item.value()))
          << item.key();
    }
    for (size_t i = 0; i < 2 && gate; ++i) {
      EXPECT_NE(&copy->gate_of(i), &net->gate_of(i));
      EXPECT_FALSE(copy->gate_of(i).expected_heads.defined());
    }
    // Whatever becomes of the original, and of its gates.
    fill_with_noise(*net);
    anneal(*net, 1.0);
    EXPECT_TRUE(torch::equal(copy->forward(x), expected));
    copy->train();
    copy->forward(x).sum().backward();
    EXPECT_TRUE(copy->layers[0]->in_proj_weight.grad().defined());
  }
}

TEST(Clone, OfOneLayerAndOfLibTorchsHolders) {
  const MultiheadAttention layer(MultiheadAttentionOptions(kDim, kHeads)
                                     .kdim(7)
                                     .vdim(5)
                                     .add_bias_kv(true)
                                     .gate(BudgetGateOptions()));
  const auto copy = std::dynamic_pointer_cast<MultiheadAttentionImpl>(layer->clone());
  ASSERT_TRUE(copy);
  EXPECT_TRUE(torch::equal(copy->k_proj_weight, layer->k_proj_weight));
  EXPECT_TRUE(copy->named_parameters()["k_proj_weight"].is_same(copy->k_proj_weight));
  EXPECT_TRUE(copy->named_parameters()["gate.base"].is_same(
      std::dynamic_pointer_cast<BudgetGateImpl>(copy->gate)->base));

  const torch::nn::Sequential sequential(torch::nn::Linear(kDim, kDim), layer);
  const auto cloned = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(sequential->clone());
  EXPECT_FALSE(cloned->at<MultiheadAttentionImpl>(1).bias_k.is_alias_of(layer->bias_k));
  EXPECT_TRUE(torch::equal(cloned->at<MultiheadAttentionImpl>(1).bias_k, layer->bias_k));
  const torch::nn::ModuleList list(layer, BudgetGate(BudgetGateOptions(), kDim, kHeads));
  EXPECT_EQ(std::dynamic_pointer_cast<torch::nn::ModuleListImpl>(list->clone())->size(), 2u);
}

TEST(Clone, APrunedLayerAndOneInFloat64) {
  MultiheadAttention pruned(MultiheadAttentionOptions(kDim, 2).head_dim(5));
  pruned->to(torch::kDouble);
  const auto copy = std::dynamic_pointer_cast<MultiheadAttentionImpl>(pruned->clone());
  EXPECT_EQ(copy->in_proj_weight.scalar_type(), torch::kDouble);
  EXPECT_TRUE(torch::equal(copy->in_proj_weight, pruned->in_proj_weight));
}

TEST(Clone, GatesOfAModelDecideTogetherInItsClone) {
  torch::manual_seed(1);
  Net net(SubsetGateOptions().k(2));
  link_gates(*net);
  Net copy = clone_of(net), again = clone_of(net);
  copy->eval();
  const auto chosen = [](Net model) {
    std::vector<int64_t> counts;
    const auto x = torch::zeros({1, 1, kDim});
    model->eval();
    for (size_t i = 0; i < 2; ++i) {
      counts.push_back(model->gate_of(i).forward(x).count.item<int64_t>());
    }
    return counts;
  };
  const auto scores = [](Net model, size_t layer) {
    return dynamic_cast<SubsetGateImpl&>(model->gate_of(layer)).scores;
  };
  torch::NoGradGuard no_grad;
  const auto before = chosen(net);
  scores(copy, 0).fill_(9.0);
  EXPECT_EQ(chosen(copy), (std::vector<int64_t>{2, 0}));
  scores(again, 1).fill_(9.0);
  EXPECT_EQ(chosen(again), (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(chosen(net), before);

  // Alone, a copy of one of them is not linked to those of the model.
  const auto alone = std::dynamic_pointer_cast<MultiheadAttentionImpl>(net->layers[1]->clone());
  const auto x = torch::zeros({1, 1, kDim});
  EXPECT_NE(checks::error_of([&] { alone->gate->forward(x); }).find("call headwise::link_gates"),
            std::string::npos);
  EXPECT_EQ(chosen(clone_of(net)), before);
  alone->eval();
  link_gates(*alone);
  EXPECT_EQ(alone->gate->forward(x).count.item<int64_t>(), 2);
}

TEST(Clone, KeepsWhatIsNoTensor) {
  torch::manual_seed(2);
  Net asked(RequestedBudgetGateOptions().scope("layer"));
  request_budget(*asked, 1.0 / 3.0);
  Net copy = clone_of(asked);
  request_budget(*asked, 1.0);
  const auto x = torch::randn({2, 4, kDim});
  copy->eval();
  EXPECT_TRUE(torch::equal(copy->gate_of(0).forward(x).count, torch::ones({2}, torch::kInt)));

  Net asleep(SleepGateOptions().keep(0.4).every(1).asleep_by(0.0).settled_from(1.0));
  link_gates(*asleep);
  for (int i = 0; i < 3; ++i) asleep->forward(x).sum().backward();
  const auto moves = [](Net net, size_t layer) {
    return dynamic_cast<SleepGateImpl&>(net->gate_of(layer)).moves().size();
  };
  ASSERT_GT(moves(asleep, 0) + moves(asleep, 1), 0u);
  Net sleeper = clone_of(asleep);
  EXPECT_EQ(moves(sleeper, 0), moves(asleep, 0));
  sleeper->gate_of(0).reset();
  EXPECT_EQ(moves(sleeper, 0), 0u);
  EXPECT_EQ(moves(sleeper, 1), moves(asleep, 1));
}

TEST(Clone, TakesAGateThatWasSetLater) {
  Net net(std::nullopt);
  net->layers[0]->set_gate(FixedGateOptions().heads(std::vector<int64_t>{1}));
  Net copy = clone_of(net);
  const auto x = torch::randn({1, 2, kDim});
  EXPECT_TRUE(torch::equal(copy->forward(x), net->forward(x)));
  EXPECT_NE(copy->layers[0]->gate, net->layers[0]->gate);
}

TEST(Clone, OfAGateThatCannotIsRefused) {
  struct OwnGate : GateImpl {
    OwnGate() : GateImpl("OwnGate", kDim, kHeads, false) {}
    Selection forward(const at::Tensor& x, const at::Tensor&) override {
      return select_all(x.size(0), kHeads, x.options());
    }
  };
  MultiheadAttention layer(kDim, kHeads);
  layer->gate = layer->register_module<GateImpl>("gate", std::make_shared<OwnGate>());
  EXPECT_NE(checks::error_of([&] {
              layer->clone();
            }).find("clone() has not been implemented for OwnGate"),
            std::string::npos);
}

TEST(Reset, MakesEveryModuleNewAgain) {
  for (const auto& gate : gates()) {
    torch::manual_seed(3);
    Net net(gate);
    link_gates(*net);
    auto& layer = *net->layers[0];
    const auto buffers = net->clone()->named_buffers();
    const auto x = torch::randn({4, 5, kDim});
    fill_with_noise(*net);
    anneal(*net, 0.5);
    for (int i = 0; i < 2; ++i) net->forward(x).sum().backward();
    SCOPED_TRACE(printed(layer));
    for (auto& each : net->layers) each->reset();
    for (const auto& item : net->named_buffers()) {
      if (item.key().find("relevance") == std::string::npos)
        EXPECT_TRUE(torch::equal(item.value(), buffers[item.key()])) << item.key();
    }
    EXPECT_LT(layer.in_proj_weight.abs().max().item<double>(), 1.0);
    EXPECT_LT(layer.out_proj->weight.abs().max().item<double>(), 1.0);
    EXPECT_EQ(layer.out_proj->bias.abs().max().item<double>(), 0.0);
    EXPECT_FALSE(layer.gate->expected_heads.defined());
  }
}

TEST(PrettyPrint, SizesAndTheOptionsThatWereSet) {
  EXPECT_EQ(printed(*MultiheadAttention(kDim, kHeads)),
            "headwise::MultiheadAttention(embed_dim=12, num_heads=3)(\n"
            "  (out_proj): torch::nn::Linear(in_features=12, out_features=12, bias=true)\n)");
  const MultiheadAttention layer(MultiheadAttentionOptions(kDim, kHeads)
                                     .dropout(0.25)
                                     .bias(false)
                                     .batch_first(true)
                                     .vdim(5)
                                     .gate(FixedGateOptions().heads(std::vector<int64_t>{0, 2})));
  const auto text = printed(*layer);
  EXPECT_NE(text.find("(embed_dim=12, num_heads=3, dropout=0.25, bias=false, vdim=5, "
                      "batch_first=true)"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("(gate): headwise::FixedGate(embed_dim=12, num_heads=3, heads=[0,2])"),
            std::string::npos)
      << text;
  EXPECT_EQ(printed(*BudgetGate(BudgetGateOptions().keep(0.25), 16, 4)).substr(0, 59),
            "headwise::BudgetGate(embed_dim=16, num_heads=4, keep=0.25)(");
}

}  // namespace test_clone

// Gates that decide together, those that are asked for a budget, and those that sleep. The numbers
// are compared with Python's in tests/python/cpp/test_cpp_parity.py.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <string>
#include <vector>

#include "checks.h"
#include "headwise/model.h"
#include "headwise/multihead_attention.h"

namespace test_scoped_gates {

using namespace headwise;

constexpr int64_t kDim = 12, kHeads = 3;

struct Layers : torch::nn::Module {
  explicit Layers(const GateOptions& gate, int count = 2) {
    for (int i = 0; i < count; ++i) {
      layers.emplace_back(MultiheadAttentionOptions(kDim, kHeads).batch_first(true).gate(gate));
      register_module("layer" + std::to_string(i), layers.back());
    }
  }

  at::Tensor forward(at::Tensor x) {
    chosen.assign(layers.size(), {});
    for (size_t i = 0; i < layers.size(); ++i) {
      auto& layer = layers[i];
      layer->on_selection = [this, i](const Selection& selection) { chosen[i] = selection; };
      x = x + std::get<0>(layer->forward(x, x, x, {}, /*need_weights=*/false));
    }
    return x;
  }

  // Heads of the whole model that ran for each sequence [B].
  at::Tensor heads() const {
    at::Tensor total;
    for (const auto& selection : chosen)
      total = total.defined() ? total + selection.count : selection.count;
    return total;
  }

  std::vector<MultiheadAttention> layers;
  std::vector<Selection> chosen;  // in the last forward
};

TEST(ScopedGates, ExactlyKHeadsOfTheModel) {
  torch::manual_seed(0);
  Layers model{GateOptions(SubsetGateOptions().k(4))};
  const auto x = torch::randn({2, 5, kDim});
  EXPECT_NE(checks::error_of([&] { model.forward(x); }).find("call headwise::link_gates"),
            std::string::npos);
  link_gates(model);
  model.eval();
  model.forward(x);
  EXPECT_TRUE(model.heads().eq(4).all().item<bool>());
  model.train();
  for (const double progress : {0.1, 0.5, 1.0}) {
    anneal(model, progress);
    model.forward(x).square().sum().backward();
    auto expected = torch::zeros({});
    for (const auto& layer : model.layers) expected = expected + layer->gate->expected_heads[0];
    EXPECT_NEAR(expected.item<double>(), 4.0, 1e-5);
    for (const auto& layer : model.layers) {
      const auto& scores = std::dynamic_pointer_cast<SubsetGateImpl>(layer->gate)->scores;
      EXPECT_TRUE(scores.grad().isfinite().all().item<bool>());
    }
  }
  EXPECT_EQ(checks::error_of([] {
              Layers wrong{GateOptions(SubsetGateOptions().k(7))};
              link_gates(wrong);
            }),
            "k must be in 1..6, got 7");
}

TEST(ScopedGates, StartFromARankingAndLoadLinked) {
  torch::manual_seed(0);
  Layers model{GateOptions(SubsetGateOptions().k(3))};
  link_gates(model);
  start_gates(model,
              {{"layer0", torch::tensor({5.0, 1.0, 4.0})}, {"layer1", torch::tensor({2., 6., 3.})}},
              0.5);
  model.eval();
  const auto x = torch::randn({2, 5, kDim});
  const auto y = model.forward(x);
  EXPECT_EQ(model.chosen[0].count[0].item<int64_t>(), 2);
  EXPECT_EQ(checks::error_of([&] { start_gates(model, {{"layer0", torch::ones({3})}}, 0.5); }),
            "importance must have a score for layer 'layer1'");
  const auto nan = torch::full({3}, std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(checks::error_of(
                [&] { start_gates(model, {{"layer0", torch::ones({3})}, {"layer1", nan}}, 0.5); }),
            "importance of layer 'layer1' must be finite, got NaN or infinity");

  Model saved;
  for (int i = 0; i < 2; ++i) {
    saved.layers.emplace_back("layer" + std::to_string(i), model.layers[i]);
  }
  const std::string folder = testing::TempDir() + "/headwise_scoped_gates";
  save(saved, folder);
  const Model loaded = load(folder);
  auto z = x;
  for (const auto& [name, layer] : loaded.layers) {
    z = z + std::get<0>(MultiheadAttention(layer)->forward(z, z, z, {}, false));
  }
  EXPECT_TRUE(at::allclose(z, y));
}

TEST(ScopedGates, RequestedBudget) {
  torch::manual_seed(0);
  Layers model{GateOptions(RequestedBudgetGateOptions())};
  link_gates(model);
  model.eval();
  const auto x = torch::randn({2, 5, kDim});
  for (const double budget : {0.01, 0.5, 1.0}) {
    request_budget(model, budget);
    model.forward(x);
    const auto expected = std::max<int64_t>(1, std::llround(budget * 6));
    EXPECT_TRUE(model.heads().eq(expected).all().item<bool>());
  }
  request_budget(model, torch::tensor({0.5, 1.0}));
  model.forward(x);
  EXPECT_TRUE(model.heads().equal(torch::tensor({3, 6}, at::kInt)));
  EXPECT_EQ(checks::error_of([&] { request_budget(model, 1.5); }),
            "budget must be in (0, 1], got 1.5");
}

TEST(ScopedGates, HeadsSleepAndWake) {
  torch::manual_seed(0);
  Layers model{GateOptions(
      SleepGateOptions().keep(0.34).every(5).asleep_by(0.0).decay(0.5).settled_from(1.0))};
  link_gates(model);
  std::vector<SleepGateImpl*> gates;
  for (const auto& layer : model.layers) {
    gates.push_back(dynamic_cast<SleepGateImpl*>(layer->gate.get()));
  }
  anneal(model, 0.5);
  const auto x = torch::randn({4, 5, kDim});
  const auto train = [&](const at::Tensor& worth) {  // [6]
    for (int step = 0; step < 30; ++step) {
      auto loss = torch::zeros({});
      for (int i = 0; i < 2; ++i) {
        loss = loss + (gates[i]->forward(x).weight * worth.narrow(0, 3 * i, 3)).sum(1).mean();
      }
      loss.backward();
    }
  };
  train(torch::tensor({5.0, 4.0, 0.1, 0.1, 0.1, 0.1}));
  EXPECT_TRUE(gates[0]->awake.equal(torch::tensor({1.f, 1.f, 0.f})));
  train(torch::tensor({5.0, 0.1, 0.1, 0.1, 4.0, 0.1}));
  EXPECT_TRUE(gates[0]->awake.equal(torch::tensor({1.f, 0.f, 0.f})));
  EXPECT_TRUE(gates[1]->awake.equal(torch::tensor({0.f, 1.f, 0.f})));
  const auto moves = gates[1]->moves();
  EXPECT_TRUE(moves.back().wakes);
  EXPECT_EQ(moves.back().head, 1);
  EXPECT_GT(moves.back().step, 30);
}

TEST(ScopedGates, ThresholdGateReadsQueriesAndKeys) {
  torch::manual_seed(0);
  Layers model{GateOptions(ThresholdGateOptions().threshold(1e9).min_heads(1))};
  model.eval();
  const auto x = torch::randn({2, 5, kDim});
  model.forward(x);
  EXPECT_TRUE(model.heads().eq(2).all().item<bool>());
  EXPECT_NE(checks::error_of([&] { model.layers[0]->gate->forward(x); }).find("queries and keys"),
            std::string::npos);
}

TEST(ScopedGates, SharedHeadsAlwaysRun) {
  torch::manual_seed(0);
  const auto options = SharedHeadsGateOptions()
                           .gate(BudgetGateOptions().budget(0.5))
                           .shared(std::vector<int64_t>{2});
  EXPECT_EQ(gate_options_to_json(gate_options_from_json(gate_options_to_json(options))),
            gate_options_to_json(options));
  Layers model{GateOptions(options)};
  model.eval();
  model.forward(torch::randn({2, 5, kDim}));
  for (const auto& selection : model.chosen) {
    EXPECT_TRUE(selection.weight.select(1, 2).eq(1).all().item<bool>());
    EXPECT_TRUE(selection.count.eq(2).all().item<bool>());
  }
}

}  // namespace test_scoped_gates

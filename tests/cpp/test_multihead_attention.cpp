// The module against torch::nn::MultiheadAttention and the oracle.
#include "checks.h"
#include "headwise/multihead_attention.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "oracle.h"

namespace test_multihead_attention {

using namespace headwise;

constexpr int64_t kDim = 24, kHeads = 4;

std::vector<std::string> parameter_names(const torch::nn::Module& module) {
  std::vector<std::string> names;
  for (const auto& item : module.named_parameters()) names.push_back(item.key());
  return names;
}

TEST(MultiheadAttention, EqualsTorchWhenEveryHeadRuns) {
  for (const bool gated : {false, true}) {
    for (const bool added : {false, true}) {
      torch::manual_seed(0);
      torch::nn::MultiheadAttention theirs(torch::nn::MultiheadAttentionOptions(kDim, kHeads)
                                               .add_bias_kv(added)
                                               .add_zero_attn(added));
      auto options =
          MultiheadAttentionOptions(kDim, kHeads).add_bias_kv(added).add_zero_attn(added);
      if (gated) options.gate(FixedGateOptions());
      MultiheadAttention ours(options);
      {
        torch::NoGradGuard no_grad;
        auto parameters = ours->named_parameters();
        for (const auto& item : theirs->named_parameters()) {
          item.value().normal_(0.0, 0.3);
          parameters[item.key()].copy_(item.value());
        }
      }
      const auto query = torch::randn({5, 3, kDim}), key = torch::randn({7, 3, kDim});
      auto padding = torch::zeros({3, 7}, at::kBool);
      padding[0].slice(0, 4).fill_(true);
      const auto mask = torch::randn({5, 7});
      const auto [y1, w1] = theirs->forward(query, key, key, padding, true, mask);
      const auto [y2, w2] = ours->forward(query, key, key, padding, true, mask);
      EXPECT_TRUE(at::allclose(y1, y2, 1e-4, 1e-5));
      EXPECT_TRUE(at::allclose(w1, w2, 1e-4, 1e-5));
    }
  }
}

TEST(MultiheadAttention, ChosenHeadsEqualTheOracle) {
  torch::manual_seed(0);
  MultiheadAttention layer(MultiheadAttentionOptions(kDim, kHeads)
                               .batch_first(true)
                               .dtype(at::kDouble)
                               .gate(BudgetGateOptions().keep(0.5)));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : layer->gate->parameters()) parameter.normal_();
  }
  const auto x = torch::randn({3, 6, kDim}, at::kDouble);
  auto padding = torch::zeros({3, 6}, at::kBool);
  padding[1].slice(0, 4).fill_(true);
  Selection selection;
  layer->on_selection = [&](const Selection& chosen) { selection = chosen; };
  for (const bool training : {true, false}) {
    layer->train(training);
    const auto [y, weights] = layer->forward(x, x, x, padding, true, {}, false);
    const auto expected = oracle::self_attention(x, layer->in_proj_weight, layer->in_proj_bias,
                                                 layer->out_proj->weight, layer->out_proj->bias,
                                                 kHeads, selection, padding);
    EXPECT_TRUE(at::allclose(y, expected));
    const auto skipped = selection_mask(selection.index, selection.count, at::kBool).logical_not();
    EXPECT_TRUE(weights.index({skipped}).eq(0).all().item<bool>());
  }
}

TEST(MultiheadAttention, KnowsSelfAttentionByItsMemory) {
  torch::manual_seed(0);
  MultiheadAttention layer(MultiheadAttentionOptions(kDim, kHeads)
                               .batch_first(true)
                               .dtype(at::kDouble)
                               .gate(BudgetGateOptions().keep(0.5)));
  {
    torch::NoGradGuard no_grad;
    for (auto& parameter : layer->gate->parameters()) parameter.normal_();
  }
  layer->eval();
  auto padding = torch::zeros({5, 6}, at::kBool);
  for (int64_t row = 0; row < 5; ++row) padding[row].slice(0, 1 + row).fill_(true);
  const auto x = torch::randn({5, 6, kDim}, at::kDouble);
  const auto run = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    return std::get<0>(layer->forward(q, k, v, padding, false));
  };
  const auto expected = run(x, x, x);
  EXPECT_TRUE(at::allclose(run(x, x.view_as(x), x.slice(0)), expected));
  // Other memory: the padding of the keys need not be that of the queries.
  EXPECT_FALSE(at::allclose(run(x, x.clone(), x.clone()), expected));
  // The key is not part of the graph: it gets no gradient.
  auto leaf = x.clone().requires_grad_();
  const auto through = [&](const at::Tensor& q, const at::Tensor& k) {
    return torch::autograd::grad({run(q, k, k).square().sum()}, {leaf})[0];
  };
  const auto both = through(leaf, leaf);
  const auto apart = through(leaf, leaf.detach()) + through(leaf.detach(), leaf);
  EXPECT_TRUE(at::allclose(apart, both));
}

// Nothing of a call stays in the layer, so threads may evaluate one at the same time.
TEST(MultiheadAttention, ThreadsEvaluateOneLayer) {
  torch::manual_seed(0);
  for (const auto& gate :
       {GateOptions(BudgetGateOptions().keep(0.5)), GateOptions(HardConcreteGateOptions()),
        GateOptions(FixedGateOptions().heads(std::vector<int64_t>{0, 2})),
        GateOptions(SharedHeadsGateOptions()
                        .gate(BudgetGateOptions().budget(0.5))
                        .shared(std::vector<int64_t>{1}))}) {
    MultiheadAttention layer(MultiheadAttentionOptions(kDim, kHeads).batch_first(true).gate(gate));
    layer->eval();
    std::mutex mutex;
    std::vector<at::Tensor> counts;
    layer->on_selection = [&](const Selection& chosen) {
      const std::lock_guard lock(mutex);
      counts.push_back(chosen.count);
    };
    constexpr int kThreads = 4, kCalls = 40;
    std::vector<at::Tensor> inputs, expected;
    {
      const torch::NoGradGuard no_grad;
      for (int i = 0; i < kThreads; ++i) {
        inputs.push_back(torch::randn({2, 5, kDim}));
        expected.push_back(std::get<0>(layer->forward(inputs[i], inputs[i], inputs[i], {}, false)));
      }
    }
    counts.clear();
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        const torch::NoGradGuard no_grad;
        for (int call = 0; call < kCalls; ++call) {
          const auto y = std::get<0>(layer->forward(inputs[i], inputs[i], inputs[i], {}, false));
          if (!at::equal(y, expected[i])) ++wrong;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(counts.size(), size_t{kThreads * kCalls});
  }
}

TEST(MultiheadAttention, ParametersAreNamedAsTorchs) {
  torch::nn::MultiheadAttention theirs(torch::nn::MultiheadAttentionOptions(kDim, kHeads));
  EXPECT_EQ(parameter_names(*MultiheadAttention(kDim, kHeads)), parameter_names(*theirs));
  MultiheadAttention gated(MultiheadAttentionOptions(kDim, kHeads).gate(BudgetGateOptions()));
  const auto names = parameter_names(*gated);
  for (const char* name :
       {"gate.base", "gate.relevance.weight", "gate.budget_hidden.weight",
        "gate.budget_hidden.bias", "gate.budget_out.weight", "gate.budget_out.bias"}) {
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  }
}

TEST(MultiheadAttention, ReadmeExample) {
  auto mha = headwise::MultiheadAttention(
      headwise::MultiheadAttentionOptions(768, 12).gate(headwise::BudgetGateOptions().keep(0.5)));
  const auto x = torch::randn({10, 2, 768});
  const auto mask = torch::zeros({2, 10}, at::kBool);
  auto [y, w] = mha->forward(x, x, x, mask);
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(w.sizes(), at::IntArrayRef({2, 10, 10}));
}

TEST(MultiheadAttention, NoHeadsLeft) {
  MultiheadAttention layer(MultiheadAttentionOptions(kDim, 0).head_dim(6).batch_first(true));
  const auto x = torch::randn({2, 5, kDim});
  const auto [y, w] = layer->forward(x, x, x);
  EXPECT_TRUE(at::allclose(y, layer->out_proj->bias.expand({2, 5, kDim})));
  EXPECT_EQ(w.sizes(), at::IntArrayRef({2, 5, 5}));
}

TEST(MultiheadAttention, Errors) {
  EXPECT_EQ(checks::error_of([] { MultiheadAttention(24, 5); }),
            "num_heads must divide embed_dim=24 (or head_dim be given), got 5");
  MultiheadAttention layer(MultiheadAttentionOptions(kDim, kHeads).batch_first(true));
  const auto x = torch::randn({2, 5, kDim});
  EXPECT_EQ(checks::error_of([&] { layer->forward(x.slice(2, 0, 10), x, x); }),
            "query must have 24 features, got 10");
  EXPECT_EQ(checks::error_of([&] { layer->forward(x, x, x, torch::zeros({2, 4}, at::kBool)); }),
            "key_padding_mask must have shape [2, 5], got [2, 4]");
  EXPECT_EQ(
      checks::error_of([&] { layer->forward(x, x, x, {}, true, torch::zeros({5, 5}, at::kLong)); }),
      "attn_mask must be boolean or floating, got Long");
  EXPECT_EQ(checks::error_of([&] { layer->forward(x, x, x, {}, true, {}, true, true); }),
            "is_causal is a hint about attn_mask, which must be given with it");
}

}  // namespace test_multihead_attention

#include "checks.h"
#include "headwise/pruning.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "headwise/gates.h"
#include "headwise/grouped_query_attention.h"
#include "headwise/multihead_attention.h"

namespace test_pruning {

using headwise::HeadPlan;
using headwise::HeadScores;
using headwise::LayerPlan;
using headwise::MultiheadAttention;
using headwise::MultiheadAttentionOptions;
using Heads = std::vector<int64_t>;

TEST(Plan, RanksGloballyAndByLayer) {
  const HeadScores scores{"m", {"a", "b"}, {{0.1, 0.9, 0.8, 0.7}, {0.2, 0.05, 0.7, 0.0}}};
  const HeadPlan global = headwise::plan(scores, 0.5);
  EXPECT_EQ(global.layers()[0].heads, (Heads{1, 2, 3}));
  EXPECT_EQ(global.layers()[1].heads, (Heads{2}));
  const HeadPlan layer = headwise::plan(scores, 0.5, 0, headwise::Scope::layer);
  EXPECT_EQ(layer.layers()[0].heads, (Heads{1, 2}));
  EXPECT_EQ(layer.layers()[1].heads, (Heads{0, 2}));
  const HeadPlan least = headwise::plan(scores, 0.5, 2);
  EXPECT_EQ(least.layers()[0].heads, (Heads{1, 2}));
  EXPECT_EQ(least.layers()[1].heads, (Heads{0, 2}));
  EXPECT_EQ(global.heads_kept(), 4);
  EXPECT_EQ(global.num_heads(), 8);
}

TEST(Plan, JsonRoundTrip) {
  const HeadPlan plan({{"a", 4, {0, 3}, {1.0, 0.1}}, {"b", 2, {}, {}}}, "michel", R"({"k": [1]})");
  EXPECT_EQ(HeadPlan::from_json(plan.to_json()), plan);
  EXPECT_EQ(HeadPlan::from_json(plan.to_json(-1)), plan);
  EXPECT_EQ(checks::error_of<c10::ValueError>([] { HeadPlan({{"a", 4, {4}, {1.0}}}); }),
            "heads in plan of layer 'a' must be between 0 and 3, got 4");
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { HeadPlan::from_json(R"({"format": "headwise.plan", "version": 1})"); }),
            "plan lacks the key \"metric\"");
}

TEST(Prune, ALayerComputesWhatTheMaskedLayerDoes) {
  const at::NoGradGuard no_grad;
  for (const Heads& heads : {Heads{0, 3}, Heads{1}, Heads{}, Heads{0, 1, 2, 3, 4}}) {
    for (const bool separate : {false, true}) {
      auto options = MultiheadAttentionOptions(15, 5).batch_first(true).dtype(at::kDouble);
      if (separate) options.kdim(7).vdim(9).add_bias_kv(true);
      MultiheadAttention layer(options);
      for (auto& parameter : layer->parameters()) parameter.normal_(0, 0.5);
      LayerPlan plan{"x", 5, heads, {}};
      std::vector<double> all(5, 0.0);
      for (const int64_t head : heads) {
        plan.scale.push_back(0.5 + 0.25 * static_cast<double>(head));
        all[head] = plan.scale.back();
      }
      layer->eval();
      MultiheadAttention small = headwise::prune(layer, plan);
      layer->set_gate(headwise::FixedGateOptions().scale(all));
      layer->eval();
      EXPECT_EQ(small->options.num_heads(), static_cast<int64_t>(heads.size()));
      EXPECT_FALSE(small->is_training());

      const auto type = at::TensorOptions(at::kDouble);
      const auto q = at::randn({2, 6, 15}, type);
      const auto k = separate ? at::randn({2, 4, 7}, type) : q;
      const auto v = separate ? at::randn({2, 4, 9}, type) : q;
      const auto actual = std::get<0>(small->forward(q, k, v, {}, false));
      const auto expected = std::get<0>(layer->forward(q, k, v, {}, false));
      EXPECT_TRUE(at::allclose(actual, expected, 1e-12, 1e-12)) << heads.size() << separate;
      EXPECT_EQ(small->out_proj->weight.size(1), static_cast<int64_t>(3 * heads.size()));
    }
  }
}

TEST(Prune, ATrainedStaticGateIsCompacted) {
  const at::NoGradGuard no_grad;
  MultiheadAttention layer(MultiheadAttentionOptions(12, 4)
                               .batch_first(true)
                               .dtype(at::kDouble)
                               .gate(headwise::HardConcreteGateOptions()));
  auto* gate = dynamic_cast<headwise::HardConcreteGateImpl*>(layer->gate.get());
  gate->log_alpha.copy_(at::tensor({-4.0, 0.3, 4.0, -0.2}));
  const LayerPlan plan = headwise::plan_from_gate(layer, "x");
  EXPECT_TRUE(layer->is_training() && gate->is_training());
  EXPECT_EQ(plan.heads, (Heads{1, 2, 3}));
  EXPECT_NEAR(plan.scale[0], 1.2 / (1 + std::exp(-0.3)) - 0.1, 1e-9);  // Voita et al. 2019
  EXPECT_EQ(plan.scale[1], 1.0);
  layer->eval();
  MultiheadAttention small = headwise::prune(layer, plan);
  const auto x = at::randn({2, 5, 12}, at::kDouble);
  EXPECT_TRUE(at::allclose(std::get<0>(small->forward(x, x, x, {}, false)),
                           std::get<0>(layer->forward(x, x, x, {}, false)), 1e-12, 1e-12));
  MultiheadAttention dynamic(MultiheadAttentionOptions(8, 4).gate(
      headwise::HardConcreteGateOptions().input_dependent(true)));
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] { headwise::plan_from_gate(dynamic, "x"); }),
            "layer 'x' has a gate whose choice depends on the input: no plan is equivalent to it");
  MultiheadAttention plain(MultiheadAttentionOptions(8, 4));
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] { headwise::plan_from_gate(plain, "x"); }),
            "layer 'x' must have a gate to make a plan from");
}

TEST(Prune, RefusesWhatDoesNotFit) {
  MultiheadAttention layer(MultiheadAttentionOptions(8, 4).gate(headwise::BudgetGateOptions()));
  EXPECT_EQ(
      checks::error_of<c10::ValueError>([&] { headwise::prune(layer, {"x", 3, {0}, {1.0}}); }),
      "plan has 3 heads for layer 'x', which has 4");
  EXPECT_EQ(
      checks::error_of<c10::ValueError>([&] { headwise::prune(layer, {"x", 4, {0}, {1.0}}); }),
      "layer 'x' has a gate that chooses for each input, among the heads it was trained "
      "with: build the layer without it first");
}

TEST(Prune, GroupsOfAStaticGate) {
  using namespace headwise;
  GroupedQueryAttention layer(
      GroupedQueryAttentionOptions(12, 6)
          .num_key_value_heads(3)
          .gate(GroupGateOptions().gate(FixedGateOptions().heads(Heads{0, 2})))
          .dtype(at::kDouble));
  layer->eval();
  const LayerPlan plan = plan_from_gate(layer, "x");
  EXPECT_EQ(plan.heads, (Heads{0, 1, 4, 5}));
  GroupedQueryAttention small = prune(layer, plan);
  EXPECT_EQ(small->num_key_value_heads(), 2);
  EXPECT_FALSE(small->options.key_value_heads() || small->is_training());
  KeyValueCache whole, less;
  const auto x = at::randn({2, 5, 12}, at::kDouble);
  EXPECT_TRUE(at::allclose(std::get<0>(small->forward(x, {.cache = &less})),
                           std::get<0>(layer->forward(x, {.cache = &whole})), 1e-12, 1e-12));
  EXPECT_EQ(whole.k.size(1), 3);
  EXPECT_EQ(less.k.size(1), 2);
}

TEST(Prune, RefusesGroupsThatDoNotFit) {
  using namespace headwise;
  GroupedQueryAttention layer(
      GroupedQueryAttentionOptions(8, 4).num_key_value_heads(2).gate(BudgetGateOptions()));
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] { prune(layer, {"x", 3, {0}, {1.0}}); }),
            "plan has 3 heads for layer 'x', which has 4");
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] { prune(layer, {"", 4, {0}, {1.0}}); }),
            "the layer has a gate that chooses for each input, among the heads it was trained "
            "with: build the layer without it first");
  GroupedQueryAttention plain(GroupedQueryAttentionOptions(8, 4).num_key_value_heads(2));
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] { plan_from_gate(plain); }),
            "the layer must have a gate to make a plan from");
  EXPECT_NE(checks::error_of<c10::ValueError>([&] { prune(plain, {"x", 4, {1, 0}, {1.0, 1.0}}); }),
            "no error");
}

}  // namespace test_pruning

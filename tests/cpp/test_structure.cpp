#include "checks.h"
#include "headwise/structure.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "headwise/cofi.h"
#include "headwise/kwon.h"
#include "headwise/model.h"

namespace test_structure {

using headwise::FfnPlan;
using headwise::HeadPlan;
using headwise::HiddenPlan;
using headwise::NamedTensors;
using headwise::StructurePlan;

StructurePlan example() {
  return StructurePlan(HeadPlan({{"a", 4, {0, 3}, {1.0, 0.5}}, {"b", 4, {}, {}}}),
                       {{"f", 6, {1, 2, 5}, {1.0, 0.1, 2.0}}}, {{"b", 0.0}, {"f", 1.5}},
                       HiddenPlan{5, {0, 4}, {1.0, 0.25}}, R"({"k": 1})");
}

TEST(StructurePlan, JsonRoundTrip) {
  const StructurePlan plan = example();
  EXPECT_EQ(StructurePlan::from_json(plan.to_json()), plan);
  EXPECT_EQ(plan.neurons_kept(), 3);
  EXPECT_EQ(plan.block_scale("b"), 0.0);
  EXPECT_EQ(plan.block_scale("x"), 1.0);
  const HeadPlan heads({{"a", 2, {1}, {1.0}}});
  EXPECT_EQ(StructurePlan::from_json(heads.to_json()), StructurePlan(heads));
  EXPECT_EQ(
      checks::error_of<c10::ValueError>([] { StructurePlan::from_json(R"({"format": "x"})"); }),
      "structure plan must have \"format\": \"headwise.structure\"");
}

TEST(PruneFfn, ComputesWhatTheMaskedNetworkDoes) {
  const auto type = at::TensorOptions(at::kDouble);
  NamedTensors p{{"linear1.weight", at::randn({6, 5}, type)},
                 {"linear1.bias", at::randn({6}, type)},
                 {"linear2.weight", at::randn({5, 6}, type)},
                 {"linear2.bias", at::randn({5}, type)}};
  const auto x = at::randn({3, 5}, type);
  for (const FfnPlan& plan :
       {FfnPlan{"f", 6, {1, 2, 5}, {1.0, 0.1, 2.0}}, FfnPlan{"f", 6, {}, {}}}) {
    for (const double block : {1.5, 0.0}) {
      auto mask = at::zeros({6}, type);
      for (size_t i = 0; i < plan.neurons.size(); ++i) mask[plan.neurons[i]] = plan.scale[i];
      const auto hidden = at::gelu(at::linear(x, p["linear1.weight"], p["linear1.bias"])) * mask;
      const auto expected = at::linear(hidden, p["linear2.weight"], p["linear2.bias"]) * block;
      NamedTensors small = headwise::prune_ffn(p, plan, block);
      EXPECT_EQ(small.count("linear2.bias"), block == 0.0 ? 0u : 1u);
      const auto kept = at::gelu(at::linear(x, small["linear1.weight"], small["linear1.bias"]));
      const auto actual = small.count("linear2.bias")
                              ? at::linear(kept, small["linear2.weight"], small["linear2.bias"])
                              : at::linear(kept, small["linear2.weight"]);
      EXPECT_TRUE(at::allclose(actual, expected, 1e-12, 1e-12));
    }
  }
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] { headwise::prune_ffn(p, {"f", 7, {}, {}}); }),
            "linear1.bias must have size 7 in dimension 0, as the plan of feed-forward network 'f' "
            "says, got shape [6]");
}

TEST(PruneHidden, TakesAndScales) {
  const auto weight = at::arange(10, at::kDouble).view({2, 5});
  const auto kept = headwise::prune_hidden(weight, 1, *example().hidden(), true);
  EXPECT_TRUE(at::equal(kept, at::tensor({0.0, 1.0, 5.0, 2.25}, at::kDouble).view({2, 2})));
}

TEST(Model, KeepsWhatPythonSaysOfTheStructure) {
  headwise::Model model;
  model.layers.emplace_back(
      "a", headwise::MultiheadAttention(headwise::MultiheadAttentionOptions(8, 2)));
  model.structure = R"({"ffn":[],"hidden":null})";
  const std::string dir = testing::TempDir() + "/headwise-structure";
  headwise::save(model, dir);
  EXPECT_EQ(headwise::load(dir).structure, model.structure);
  model.structure.clear();
  headwise::save(model, dir);
  EXPECT_EQ(headwise::load(dir).structure, "");
}

TEST(Kwon, SearchSpendsTheLimitOnWhatMattersMost) {
  const headwise::UnitScores heads{{5.0, 1.0}, {4.0, 0.5}};
  const headwise::UnitScores neurons{{3.0, 0.1}, {2.0, 0.2}};
  const auto kept = headwise::search_macs(heads, neurons, 2.0, 0.5, 4.0);
  // One head and all neurons: 10.3; two heads alone: 9.
  EXPECT_EQ(kept.heads, (headwise::UnitIndices{{0}, {}}));
  EXPECT_EQ(kept.neurons, (headwise::UnitIndices{{0, 1}, {0, 1}}));
  EXPECT_DOUBLE_EQ(kept.cost, 4.0);
}

TEST(Kwon, ScalesSolveTheRidgeRegression) {
  const auto weight = at::randn({4, 2}, at::kDouble), inputs = at::randn({9, 2}, at::kDouble);
  // A residual that the scales 3 and -1 explain, which is 2 and -2 more than 1.
  const auto residual = at::mm(inputs * at::tensor({2.0, -2.0}, at::kDouble), weight.t());
  headwise::ScaleSolver solver(weight, 1);
  solver.add(inputs, residual);
  const auto scale = solver.solve(0.0);
  ASSERT_TRUE(scale.has_value());
  EXPECT_NEAR((*scale)[0], 3.0, 1e-9);
  EXPECT_NEAR((*scale)[1], -1.0, 1e-9);
}

TEST(CoFi, SizeIsDifferentiable) {
  const auto ones = [](int64_t n) { return at::ones({n}); };
  auto hidden = ones(6).set_requires_grad(true);
  const std::vector<at::Tensor> heads{ones(2), ones(2)}, neurons{ones(5), ones(5)};
  const auto size = headwise::structure_size(heads, ones(2), neurons, ones(2), hidden, {3, 3});
  EXPECT_DOUBLE_EQ(size.item<double>(), 2 * 4 * 6 * 6 + 2 * 2 * 5 * 6);
  size.backward();
  EXPECT_TRUE(at::allclose(hidden.grad(), at::full({6}, 2.0 * 4 * 6 + 2 * 2 * 5)));
}

}  // namespace test_structure

// Gates and their options. The numbers are compared with Python's in
// tests/python/cpp/test_cpp_parity.py.
#include "checks.h"
#include "headwise/gates.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>

namespace test_gates {

using namespace headwise;

constexpr int64_t kDim = 16, kHeads = 6;

std::vector<GateOptions> every_gate() {
  return {FixedGateOptions().heads(std::vector<int64_t>{0, 2}),
          FixedGateOptions(),
          RandomGateOptions().keep(0.4),
          BudgetGateOptions().keep(0.4),
          BudgetGateOptions().relaxation("straight_through").kept_weight("soft").noise("normal"),
          HardConcreteGateOptions(),
          HardConcreteGateOptions().input_dependent(true).penalty("lagrangian"),
          HardConcreteGateOptions().input_dependent(true).kept_weight("one").penalty("l0"),
          SubsetGateOptions().scope("layer").k(2),
          SubsetGateOptions().scope("layer").estimator("straight_through"),
          RequestedBudgetGateOptions().scope("layer").min_heads(1),
          GumbelSigmoidGateOptions().keep(0.25),
          SleepGateOptions().scope("layer"),
          SharedHeadsGateOptions().gate(BudgetGateOptions().keep(0.3)).shared({1, 4})};
}

TEST(Gates, SelectionsAreConsistent) {
  torch::manual_seed(0);
  const auto x = torch::randn({5, 4, kDim});
  for (const auto& options : every_gate()) {
    const auto gate = make_gate(options, kDim, kHeads);
    for (const auto& parameter : gate->parameters()) {
      torch::NoGradGuard no_grad;
      parameter.normal_(0.0, 2.0);
    }
    for (const double progress : {0.0, 0.6, 1.0}) {
      gate->anneal(progress);
      for (const bool training : {true, false}) {
        gate->train(training);
        const auto selection = gate->forward(x);
        const auto chosen = selection_mask(selection.index, selection.count, at::kBool);
        EXPECT_TRUE(chosen.sum(1).eq(selection.count).all().item<bool>());
        EXPECT_TRUE(selection.weight.masked_fill(chosen, 0.0).eq(0).all().item<bool>());
      }
    }
  }
}

TEST(Gates, OptionsRoundTripThroughJson) {
  for (const auto& options : every_gate()) {
    const auto json = gate_options_to_json(options);
    EXPECT_EQ(gate_options_to_json(gate_options_from_json(json)), json);
  }
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { gate_options_from_json(R"({"type":"RandomGate","colour":1})"); }),
            "RandomGate has no option 'colour'; it has keep, per_input, execution");
  const auto type_error = [](const char* json) {
    return checks::error_of<c10::TypeError>([&] { gate_options_from_json(json); });
  };
  EXPECT_EQ(type_error(R"({"type":"BudgetGate","keep":"x"})"), "keep must be a number, got 'x'");
  EXPECT_EQ(type_error(R"({"type":"SubsetGate","k":true})"), "k must be a number, got True");
  for (const auto* json :
       {"[]", "null", R"({"type":3})", R"({"type":"SharedHeadsGate"})",
        R"({"type":"SubsetGate","k":2.5})", R"({"type":"SubsetGate","k":99999999999999999999})",
        R"({"type":"FixedGate","heads":[-1]})", R"({"type":"FixedGate","heads":[1,1]})",
        R"({"type":"BudgetGate","keep":1e999})", R"({"type":"BudgetGate","strength":-1})"}) {
    const auto text = checks::error_of<c10::ValueError>([&] { gate_options_from_json(json); });
    EXPECT_NE(text, "no error") << json;
    EXPECT_LT(text.size(), 500) << json;
  }
  std::string nested = R"({"type":"BudgetGate"})";
  for (int i = 0; i < 2000; ++i) nested = R"({"type":"SharedHeadsGate","gate":)" + nested + "}";
  EXPECT_NE(
      checks::error_of<c10::ValueError>([&] { gate_options_from_json(nested); }).find("nested"),
      std::string::npos);
  EXPECT_EQ(
      checks::error_of<c10::ValueError>([] { gate_options_from_json(R"({"type":"Other"})"); }),
      "gate type must be one of BudgetGate, FixedGate, GroupGate, GumbelSigmoidGate, "
      "HardConcreteGate, RandomGate, RequestedBudgetGate, SharedHeadsGate, SleepGate, SubsetGate, "
      "ThresholdGate, got 'Other'");
  EXPECT_NE(checks::error_of<c10::ValueError>([] {
              gate_options_from_json("{");
            }).find("gate options must be JSON"),
            std::string::npos);
}

TEST(Gates, EvaluationRunsWhatTheEndOfTrainingRan) {
  torch::manual_seed(0);
  const auto x = torch::randn({7, 4, kDim});
  for (const auto& options : {GateOptions(BudgetGateOptions()),
                              GateOptions(HardConcreteGateOptions().input_dependent(true))}) {
    const auto gate = make_gate(options, kDim, kHeads);
    for (const auto& parameter : gate->parameters()) {
      torch::NoGradGuard no_grad;
      parameter.normal_(0.0, 2.0);
    }
    gate->forward(x);
    gate->anneal(1.0);
    const auto trained = gate->forward(x);
    gate->eval();
    EXPECT_TRUE(at::allclose(trained.weight, gate->forward(x).weight));
    EXPECT_TRUE(trained.weight.requires_grad());
  }
}

// Where no gradient is wanted a kernel evaluates the gate, elsewhere the operators do.
TEST(Gates, EvaluatedInOnePassAsByTheOperators) {
  torch::manual_seed(0);
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf})
    for (const int64_t length : {0, 1, 9, 300}) {
      const auto x = torch::randn({11, length, 35}).to(type);
      const auto padding = torch::arange(length).ge(torch::randint(0, length + 1, {11, 1}));
      BudgetGate gate(BudgetGateOptions().rounding("ceil"), 35, kHeads, at::dtype(type));
      gate->eval();
      torch::NoGradGuard no_grad;
      for (const auto& parameter : gate->parameters()) parameter.normal_();
      const auto run = gate->forward(x.transpose(0, 1).contiguous().transpose(0, 1), padding);
      // The operators round the mean to x's type: they are given the same numbers in more digits.
      const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
      gate->to(wide);
      torch::AutoGradMode with_grad(true);
      const auto expected = gate->forward(x.to(wide), padding);
      EXPECT_TRUE(at::equal(run.index, expected.index)) << type << " " << length;
      EXPECT_TRUE(at::equal(run.count, expected.count));
      EXPECT_TRUE(at::equal(run.weight.to(wide), expected.weight));
      EXPECT_TRUE(at::allclose(run.relevance, expected.relevance, 1e-4, 1e-4));
      EXPECT_TRUE(at::allclose(run.budget, expected.budget, 1e-4, 1e-4));
    }
  at::set_num_threads(before);
}

TEST(Gates, FullBudgetIsExactlyOne) {
  BudgetGate gate(BudgetGateOptions().keep(1.0), kDim, kHeads);
  for (const bool training : {true, false}) {
    gate->train(training);
    const auto selection = gate->forward(torch::randn({3, 4, kDim}));
    EXPECT_TRUE(selection.weight.eq(1).all().item<bool>());
    EXPECT_TRUE(selection.count.eq(kHeads).all().item<bool>());
  }
}

TEST(Gates, PenaltyPoolsTheModel) {
  torch::manual_seed(0);
  std::vector<std::shared_ptr<GateImpl>> gates;
  struct Holder : torch::nn::Module {};
  Holder holder;
  for (int i = 0; i < 2; ++i) {
    gates.push_back(make_gate(BudgetGateOptions().keep(0.4).bounds_strength(0.0), kDim, kHeads));
    holder.register_module("gate" + std::to_string(i), gates.back());
  }
  EXPECT_EQ(penalty(holder).item<double>(), 0.0);
  anneal(holder, 1.0);
  auto share = torch::zeros({});
  for (const auto& gate : gates) {
    gate->forward(torch::randn({9, 4, kDim}));
    share = share + gate->expected_heads.mean() / (2 * kHeads);
  }
  EXPECT_TRUE(at::allclose(penalty(holder), 20.0 * (share - 0.4).square()));
}

// The numbers of tests/python/gates/test_gates.py.
TEST(Gates, PenaltyOfMixedGatesIsOfThoseThatHaveOne) {
  auto list = torch::nn::ModuleList();
  const auto budget = make_gate(BudgetGateOptions().target_scope("layer"), kDim, kHeads);
  for (const auto& options : std::vector<GateOptions>{
           FixedGateOptions(), RandomGateOptions(), SubsetGateOptions().scope("layer"),
           SleepGateOptions().scope("layer"), ThresholdGateOptions()}) {
    list->push_back(make_gate(options, kDim, kHeads));
  }
  list->push_back(budget);
  list->train();
  {  // away from the share that training starts with, which has no penalty
    const torch::NoGradGuard no_grad;
    for (auto& parameter : budget->parameters()) parameter.normal_();
  }
  const auto x = torch::randn({5, 4, kDim});
  for (size_t i = 0; i < list->size(); ++i) {
    auto& gate = list->at<GateImpl>(i);
    if (!gate.reads_heads()) gate.forward(x);
  }
  EXPECT_GT(budget->penalty().item<double>(), 0.0);
  EXPECT_DOUBLE_EQ(penalty(*list).item<double>(), budget->penalty().item<double>());
}

TEST(Gates, Errors) {
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { BudgetGate(BudgetGateOptions().keep(0.0), kDim, kHeads); }),
            "keep must be in (0, 1], got 0.0");
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { BudgetGate(BudgetGateOptions().noise("pink"), kDim, kHeads); }),
            "noise must be one of gumbel, normal, got 'pink'");
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { HardConcreteGate(HardConcreteGateOptions().beta(0), kDim, kHeads); }),
            "beta must be positive and finite, got 0.0");
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { FixedGate(FixedGateOptions().heads(std::vector<int64_t>{7}), kDim, kHeads); }),
            "heads must be in 0..5, got 7");
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [] { RandomGate(RandomGateOptions(), kDim, kHeads)->anneal(2); }),
            "progress must be between 0 and 1, got 2");
  EXPECT_EQ(checks::error_of<c10::ValueError>([] {
              FixedGate(FixedGateOptions(), kDim, kHeads)->forward(torch::randn({2, 3, 5}));
            }),
            "x must have shape [B, L, 16], got [2, 3, 5]");
}

}  // namespace test_gates

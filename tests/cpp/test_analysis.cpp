#include "headwise/analysis.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "headwise/bootstrap.h"
#include "headwise/head_similarity.h"

namespace test_analysis {

at::Tensor numbers(std::vector<double> values, std::vector<int64_t> sizes) {
  return at::tensor(values, at::kDouble).view(sizes);
}

TEST(Analysis, BootstrapOfTwoExamplesIsEnumeration) {
  // Means of the equally likely resamples of (1, -3): 1, -1, -1, -3.
  const auto [mean, low, high, p] = headwise::paired_bootstrap(numbers({1, -3}, {1, 2}), 20000, 3);
  EXPECT_EQ(mean.item<double>(), -1);
  EXPECT_EQ(low.item<double>(), -3);
  EXPECT_EQ(high.item<double>(), 1);
  EXPECT_NEAR(p.item<double>(), 0.5, 0.02);
  EXPECT_THROW(headwise::paired_bootstrap(at::zeros({1, 0}, at::kDouble)), c10::ValueError);
}

TEST(Analysis, RankCorrelationsOfNeighboursSwapped) {
  const auto scores = numbers({1, 5, 3, 2, 4, 2, 5, 3, 1, 4}, {2, 5});
  const auto rho = std::get<0>(headwise::rank_agreement(scores, "spearman", 10));
  const auto tau = std::get<0>(headwise::rank_agreement(scores, "kendall", 10));
  EXPECT_NEAR(rho[0][1].item<double>(), 0.9, 1e-12);  // 1 - 6 * 2 / (5 * 24)
  EXPECT_NEAR(tau[1][0].item<double>(), 0.8, 1e-12);  // 1 - 2 / 10
}

TEST(Analysis, CkaSeesNoRotation) {
  const auto x = at::randn({20, 3}, at::kDouble);
  const auto rotation = std::get<0>(at::linalg_qr(at::randn({3, 3}, at::kDouble)));
  const auto cka = headwise::linear_cka({x, at::matmul(x, rotation) * 2 + 1});
  EXPECT_NEAR(cka[0][1].item<double>(), 1, 1e-12);
}

TEST(Analysis, SecondOrderEffect) {
  const auto full = numbers({1, 2}, {2});
  const auto [effect, error] = headwise::second_order_effect(
      full, numbers({2, 2}, {1, 2}), numbers({1, 3}, {1, 2}), numbers({5, 4}, {1, 2}));
  EXPECT_NEAR(effect.item<double>(), 2, 1e-12);  // of 3 and 1
  EXPECT_NEAR(error.item<double>(), 1, 1e-12);   // sqrt(2) / sqrt(2)
}

TEST(Analysis, HeldFunctionsConserve) {
  const auto x = at::randn({2, 5}, at::kDouble).requires_grad_();
  const auto y = headwise::held_slope(x, at::tanh(x));
  y.sum().backward();
  EXPECT_TRUE(at::allclose(x * x.grad(), at::tanh(x)));

  const auto z = at::randn({2, 5}, at::kDouble).requires_grad_();
  const auto bias = at::randn({5}, at::kDouble).requires_grad_();
  const auto weight = at::randn({5}, at::kDouble);
  const auto out = headwise::held_layer_norm(z, weight, bias, 1e-5);
  EXPECT_TRUE(at::allclose(out, at::layer_norm(z, {5}, weight, bias, 1e-5)));
  out.sum().backward();
  const auto total = (z * z.grad()).sum() + (bias * bias.grad()).sum();
  EXPECT_NEAR(total.item<double>(), out.sum().item<double>(), 1e-9);
}

TEST(Analysis, CausalRolesSumToOne) {
  const auto raised = at::rand({7}), lowered = at::rand({7});
  const auto [helps, hinders, neither] = headwise::causal_roles(raised, lowered);
  EXPECT_TRUE(at::allclose(helps + hinders + neither, at::ones({7})));
}

TEST(Analysis, ThresholdIsTheLargestThatTheLimitAllows) {
  const auto confidence = numbers({0.9, 0.6, 0.3}, {1, 3});
  const auto cost = numbers({1, 1, 1, 3, 3, 3}, {2, 3});
  EXPECT_EQ(headwise::confidence_threshold(confidence, cost, 1.0), 0.3);
  EXPECT_EQ(headwise::confidence_threshold(confidence, cost, 2.5), 0.6);
  EXPECT_EQ(headwise::confidence_threshold(confidence, cost, 3.0), 0.9);
  EXPECT_TRUE(std::isinf(headwise::confidence_threshold(confidence, cost, 4.0)));
  EXPECT_THROW(headwise::confidence_threshold(confidence, cost, 0.5), c10::ValueError);
}

}  // namespace test_analysis

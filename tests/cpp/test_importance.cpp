#include "headwise/importance.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace test_importance {

using headwise::AbsoluteValue;
using headwise::HeadScoreAccumulator;
using headwise::HeadScores;

constexpr int64_t kBatch = 4, kHeads = 3, kLength = 5, kWidth = 2;

/// Michel et al. by loops: values[absolute][head], not normalised.
std::vector<std::vector<double>> by_hand(const at::Tensor& context, const at::Tensor& gradient,
                                         const at::Tensor& padding) {
  std::vector<std::vector<double>> found(3, std::vector<double>(kHeads, 0.0));
  double tokens = 0;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t t = 0; t < kLength; ++t) tokens += !padding[b][t].item<bool>();
  }
  for (int64_t h = 0; h < kHeads; ++h) {
    double batch = 0;
    for (int64_t b = 0; b < kBatch; ++b) {
      double example = 0;
      for (int64_t t = 0; t < kLength; ++t) {
        if (padding[b][t].item<bool>()) continue;
        const double s = context[b][h][t].dot(gradient[b][h][t]).item<double>();
        found[0][h] += std::abs(s) / tokens;
        example += s;
      }
      found[1][h] += std::abs(example) / kBatch;
      batch += example;
    }
    found[2][h] = std::abs(batch) / kBatch;
  }
  return found;
}

TEST(Importance, EqualsTheDefinitionAndMerges) {
  const auto type = at::TensorOptions(at::kDouble);
  const auto context = at::randn({kBatch, kHeads, kLength, kWidth}, type);
  const auto gradient = at::randn({kBatch, kHeads, kLength, kWidth}, type);
  const auto lengths = at::tensor({5, 2, 3, 1}).unsqueeze(1);
  const at::Tensor padding = at::arange(kLength).unsqueeze(0).ge(lengths);  // [B, L]
  const auto expected = by_hand(context, gradient, padding);

  HeadScoreAccumulator whole, first, second;
  whole.add_gradient("a", context, gradient, padding);
  first.add_gradient("a", context.slice(0, 0, 1), gradient.slice(0, 0, 1), padding.slice(0, 0, 1));
  second.add_gradient("a", context.slice(0, 1), gradient.slice(0, 1), padding.slice(0, 1));
  first.merge(second);
  int row = 0;
  for (const auto absolute :
       {AbsoluteValue::per_token, AbsoluteValue::per_example, AbsoluteValue::per_batch}) {
    const HeadScores one = whole.michel(absolute, false), split = first.michel(absolute, false);
    for (int64_t h = 0; h < kHeads; ++h) {
      EXPECT_NEAR(one.values[0][h], expected[row][h], 1e-12);
      if (absolute != AbsoluteValue::per_batch) {
        EXPECT_NEAR(split.values[0][h], expected[row][h], 1e-12);
      }
    }
    ++row;
  }
  double squares = 0;
  const HeadScores normalised = whole.michel();
  for (const double value : normalised.values[0]) squares += value * value;
  EXPECT_NEAR(squares, 1.0, 1e-12);
}

TEST(Importance, HiesWeighsScaledParts) {
  const HeadScores importance{"michel", {"a", "b"}, {{1, 3}, {2, 5}}};
  const HeadScores entropy{"entropy", {"a", "b"}, {{0.2, 0.4}, {0.9, 0.7}}};
  const auto layer = headwise::hies(importance, entropy, 0.25, headwise::Scope::layer);
  EXPECT_NEAR(layer.values[0][0], 0.75, 1e-12);
  EXPECT_NEAR(layer.values[1][1], 1.0, 1e-12);
  const auto model = headwise::hies(importance, entropy, 0.25, headwise::Scope::model);
  EXPECT_NEAR(model.values[0][1], 0.25 * 0.5 + 0.75 * (1 - 0.2 / 0.7), 1e-12);
  EXPECT_THROW(headwise::hies(importance, entropy, 1.5), c10::ValueError);
  EXPECT_THROW(headwise::hies(importance, {"entropy", {"a"}, {{1, 2}}}), c10::ValueError);
}

TEST(Importance, RefusesWhatSaysNothing) {
  HeadScoreAccumulator accumulator;
  EXPECT_THROW(accumulator.michel(), c10::ValueError);
  const auto zeros = at::zeros({1, 2, 3, 4});
  accumulator.add_gradient("a", zeros, zeros);
  EXPECT_THROW(accumulator.michel(), c10::ValueError);
  EXPECT_THROW(accumulator.add_gradient("a", zeros, at::full_like(zeros, NAN)), c10::ValueError);
  EXPECT_THROW(accumulator.add_gradient("a", zeros.slice(1, 0, 1), zeros), c10::ValueError);
  const auto scores = HeadScores::from_json(HeadScores{"m", {"a"}, {{0.1, 1e-17}}}.to_json());
  EXPECT_EQ(scores.values[0], (std::vector<double>{0.1, 1e-17}));
}

}  // namespace test_importance

// Moments and least squares of repair: against plain matrix formulas, and what they refuse.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "headwise/repair.h"

namespace headwise {
namespace test_repair {

struct Data {
  at::Tensor x, y, weight, bias;
};

Data make_data(int64_t tokens = 50, int64_t inputs = 6, int64_t outputs = 4) {
  torch::manual_seed(0);
  const auto options = at::TensorOptions(at::kDouble);
  const at::Tensor x = at::randn({tokens, inputs}, options) + 1.0;
  const at::Tensor noise = 0.1 * at::randn({tokens, outputs}, options);
  const at::Tensor y = at::mm(x, at::randn({inputs, outputs}, options)) + 2.0 + noise;
  return {x, y, at::randn({outputs, inputs}, options), at::zeros({outputs}, options)};
}

OutputMoments moments_of(const Data& data) {
  OutputMoments moments(data.x.size(1), data.y.size(1));
  moments.add(data.x.slice(0, 0, 20), data.y.slice(0, 0, 20));
  moments.add(data.x.slice(0, 20), data.y.slice(0, 20));
  return moments;
}

at::Tensor plain(const Data& data, double ridge) {
  const at::Tensor x = data.x - data.x.mean(0), y = data.y - data.y.mean(0);
  const auto tokens = static_cast<double>(x.size(0));
  const at::Tensor gram = at::mm(x.t(), x) / tokens;
  const at::Tensor held = gram + ridge * gram.diagonal().mean() * at::eye(x.size(1), x.options());
  const at::Tensor rest = at::mm(x.t(), y - at::mm(x, data.weight.t())) / tokens;
  return data.weight + at::linalg_solve(held, rest).t();
}

TEST(Repair, SolvesTheNormalEquations) {
  const Data data = make_data();
  for (const double ridge : {1e-6, 0.1}) {
    const OutputProjection found = moments_of(data).solve({data.weight, data.bias}, ridge);
    const at::Tensor expected = plain(data, ridge);
    EXPECT_TRUE(at::allclose(found.weight, expected, 1e-6, 1e-8));
    const at::Tensor bias = data.y.mean(0) - at::mv(expected, data.x.mean(0));
    EXPECT_TRUE(at::allclose(*found.bias, bias, 1e-6, 1e-8));
  }
}

TEST(Repair, ErrorIsTheMeanSquaredDistance) {
  const Data data = make_data();
  const at::Tensor off = data.y - at::mm(data.x, data.weight.t());
  EXPECT_NEAR(moments_of(data).error({data.weight, std::nullopt}),
              off.square().sum(1).mean().item<double>(), 1e-8);
}

TEST(Repair, ACopyDoesNotFollow) {
  const Data data = make_data();
  const OutputMoments moments = moments_of(data);
  OutputMoments copy = moments;
  const double before = moments.error({data.weight, std::nullopt});
  copy.add(data.x, 2.0 * data.y);
  EXPECT_EQ(moments.error({data.weight, std::nullopt}), before);
  EXPECT_EQ(moments.tokens(), 50);
  EXPECT_EQ(copy.tokens(), 100);
}

TEST(Repair, KeepsWeightsThatNoRidgeBetters) {
  const Data data = make_data();
  const OutputMoments moments = moments_of(data);
  const OutputProjection best = moments.solve({data.weight, data.bias}, 1e-9);
  const Repaired found = repair_projection(moments, moments, best, {1e3, 1e4});
  EXPECT_FALSE(found.ridge.has_value());
  EXPECT_TRUE(at::equal(found.projection.weight, best.weight));
  const Repaired repaired = repair_projection(moments, moments, {data.weight, data.bias}, {1e-9});
  EXPECT_LT(repaired.error_after, repaired.error_before);
  EXPECT_NEAR(repaired.variance, moments.variance(), 1e-9);
}

TEST(Repair, RemovalEndsAtTheVariance) {
  const Data data = make_data();
  const OutputMoments moments = moments_of(data);
  const RemovalOrder order = removal_order(moments, data.weight, 2, 1e-9);
  ASSERT_EQ(order.units.size(), 3u);
  EXPECT_LE(order.error[0], order.error[1]);
  EXPECT_NEAR(order.error[2], moments.variance(), 1e-6);
}

TEST(Repair, RefusesWhatIsNotFinite) {
  OutputMoments moments(2, 2);
  const at::Tensor ones = at::ones({3, 2}), bad = at::full({3, 2}, NAN);
  EXPECT_THROW(moments.add(bad, ones), c10::ValueError);
  EXPECT_THROW(moments.add(ones, bad), c10::ValueError);
  EXPECT_THROW(moments.solve({at::zeros({2, 2}), std::nullopt}, 0.1), c10::ValueError);
  moments.add(ones, ones);
  EXPECT_THROW(moments.solve({at::zeros({2, 2}), std::nullopt}, 0.0), c10::Error);  // singular
  EXPECT_THROW(moments.merge(OutputMoments(3, 2)), c10::ValueError);
  EXPECT_THROW(moments.select({1, 0}), c10::ValueError);
}
}  // namespace test_repair

}  // namespace headwise

// The projections of the chosen heads against the oracle, and the groups that they read.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "checks.h"
#include "headwise/attention.h"
#include "headwise/selection.h"
#include "oracle.h"

namespace test_projection {

using at::Tensor;

struct Case {
  at::ScalarType type;
  int64_t batch, length, width, num_heads, head_width, chosen;
  double tolerance;  // of outputs and gradients, over the largest value of the reference
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.type << " B" << c.batch << " L" << c.length << " D" << c.width << " H"
             << c.num_heads << " d" << c.head_width << " k" << c.chosen;
}

class Projection : public testing::TestWithParam<Case> {
 protected:
  /// y and its gradients against those of the oracle.
  void compare(const Tensor& y, const Tensor& expected, const std::vector<Tensor>& leaves) {
    const auto& c = GetParam();
    checks::expect_close(y, expected, c.tolerance);
    const auto upstream = at::randn(y.sizes()).to(c.type);
    const auto got = torch::autograd::grad({y}, leaves, {upstream});
    const auto want = torch::autograd::grad({expected}, leaves, {upstream.to(at::kDouble)});
    for (size_t i = 0; i < leaves.size(); ++i)
      checks::expect_close(got[i], want[i], 2 * c.tolerance);
  }
  Tensor rand(at::IntArrayRef sizes) {
    return (at::randn(sizes) * 0.4).to(GetParam().type).requires_grad_();
  }
};

TEST_P(Projection, EqualsTheOracleForwardAndBackward) {
  const auto& c = GetParam();
  at::manual_seed(19);
  const int64_t e = c.num_heads * c.head_width;
  auto x = rand({c.batch, c.length, c.width}), weight = rand({e, c.width}), bias = rand({e});
  auto selection = oracle::random_selection(c.batch, c.num_heads, c.chosen, c.type);
  auto ones = selection;
  ones.weight = at::ones_like(selection.weight, at::kDouble);
  const auto heads = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble))
                         .view({c.batch, c.length, c.num_heads, c.head_width})
                         .transpose(1, 2);
  compare(
      headwise::selected_projection(x, weight, bias, c.num_heads, selection.index, selection.count),
      heads * oracle::dense_weight(ones).unsqueeze(-1).unsqueeze(-1), {x, weight, bias});
}

TEST_P(Projection, OfTheOutputEqualsTheOracleForwardAndBackward) {
  const auto& c = GetParam();
  at::manual_seed(23);
  const int64_t e = c.num_heads * c.head_width;
  auto heads = rand({c.batch, c.num_heads, c.length, c.head_width}), weight = rand({c.width, e}),
       bias = rand({c.width});
  auto selection = oracle::random_selection(c.batch, c.num_heads, c.chosen, c.type);
  selection.weight.requires_grad_();
  auto wide = selection;
  wide.weight = selection.weight.to(at::kDouble);
  const auto joined =
      (heads.to(at::kDouble) * oracle::dense_weight(wide).unsqueeze(-1).unsqueeze(-1))
          .transpose(1, 2)
          .reshape({c.batch, c.length, e});
  compare(headwise::selected_output_projection(heads, weight, bias, selection.index,
                                               selection.count, selection.weight),
          at::linear(joined, weight.to(at::kDouble), bias.to(at::kDouble)),
          {heads, weight, bias, selection.weight});
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Projection,
    testing::Values(
        Case{at::kDouble, 3, 70, 20, 4, 5, 2, 1e-12}, Case{at::kFloat, 3, 137, 24, 4, 16, 2, 3e-5},
        Case{at::kFloat, 2, 9, 20, 4, 5, 3, 3e-5},  // widths that fit no vector
        Case{at::kBFloat16, 3, 137, 24, 4, 16, 2, 3e-2}, Case{at::kHalf, 2, 67, 24, 4, 8, 1, 5e-3},
        Case{at::kFloat, 1, 1, 40, 3, 16, 2, 3e-5},     // a decoding step
        Case{at::kBFloat16, 9, 1, 40, 5, 16, 2, 3e-2},  // of several sequences
        Case{at::kFloat, 40, 7, 40, 3, 16, 1, 3e-5},    // short ones
        Case{at::kFloat, 0, 5, 16, 2, 8, 1, 0}, Case{at::kFloat, 2, 5, 16, 2, 8, 0, 3e-5},
        Case{at::kFloat, 2, 0, 16, 2, 8, 1, 3e-5}));

TEST(SelectedProjection, RefusesBadInputInOneSentence) {
  const auto x = at::zeros({1, 3, 4}), weight = at::zeros({6, 4});
  const auto index = at::tensor({0, 5}, at::kInt).view({1, 2}), count = at::full({1}, 2, at::kInt);
  EXPECT_THROW(headwise::selected_projection(x, weight, {}, 2, index, count), c10::IndexError);
  EXPECT_THROW(headwise::selected_projection(x, weight.to(at::kHalf), {}, 2, index, count),
               c10::TypeError);
  EXPECT_EQ(checks::error_of<c10::ValueError>([&] {
              headwise::selected_output_projection(at::zeros({1, 2, 3, 4}), weight, {}, index,
                                                   count);
            }),
            "weight must be [Dout, H * d] with size 8 in dimension 1, got shape [6, 4]");
}

TEST(SelectGroups, AreThoseOfTheChosenHeads) {
  const auto index = at::tensor({0, 1, 5, -1, 2, 3, -1, -1}, at::kInt).view({2, 4});
  const auto [groups, count] = headwise::select_groups(index, at::tensor({3, 2}, at::kInt), 6, 3);
  EXPECT_TRUE(at::equal(groups, at::tensor({0, 2, -1, 1, -1, -1}, at::kInt).view({2, 3})));
  EXPECT_TRUE(at::equal(count, at::tensor({2, 1}, at::kInt)));
  EXPECT_THROW(headwise::select_groups(index, count, 6, 4), c10::ValueError);
}

}  // namespace test_projection

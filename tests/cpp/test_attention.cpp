#include "checks.h"
#include "headwise/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "oracle.h"

namespace test_attention {

using at::Tensor;

struct Case {
  at::ScalarType type;
  int64_t batch, length, width, num_heads, head_width, chosen;
  bool padded, causal;
  double tolerance;  // of the output and of gradients, over the largest value of the reference
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.type << " B" << c.batch << " L" << c.length << " D" << c.width << " H"
             << c.num_heads << " d" << c.head_width << " k" << c.chosen;
}

class SelfAttention : public testing::TestWithParam<Case> {};

TEST_P(SelfAttention, EqualsTheOracleForwardAndBackward) {
  const auto& c = GetParam();
  at::manual_seed(17);
  auto rand = [&](at::IntArrayRef sizes) {
    return (at::randn(sizes) * 0.4).to(c.type).requires_grad_();
  };
  const int64_t e = c.num_heads * c.head_width;
  auto x = rand({c.batch, c.length, c.width}), in_weight = rand({3 * e, c.width}),
       in_bias = rand({3 * e}), out_weight = rand({c.width, e}), out_bias = rand({c.width});
  auto selection = oracle::random_selection(c.batch, c.num_heads, c.chosen, c.type);
  selection.weight.requires_grad_();
  headwise::AttentionArguments arguments;
  arguments.is_causal = c.causal;
  if (c.padded) {
    auto lengths = at::arange(1, c.batch + 1).unsqueeze(1) * c.length / (c.batch + 1) + 1;
    arguments.key_padding_mask = at::arange(c.length).unsqueeze(0) >= lengths;
  }
  auto y = headwise::selected_self_attention(x, in_weight, in_bias, out_weight, out_bias,
                                             c.num_heads, selection.index, selection.count,
                                             selection.weight, arguments);
  auto wide = selection;
  wide.weight = selection.weight.to(at::kDouble);
  auto expected =
      oracle::self_attention(x.to(at::kDouble), in_weight.to(at::kDouble), in_bias.to(at::kDouble),
                             out_weight.to(at::kDouble), out_bias.to(at::kDouble), c.num_heads,
                             wide, arguments.key_padding_mask, c.causal);
  checks::expect_close(y, expected, c.tolerance);
  auto upstream = at::randn(y.sizes());
  // The bias of the keys cancels in softmax, so in_bias is compared through the others' scale.
  const std::vector<Tensor> leaves = {x,          in_weight, in_bias,
                                      out_weight, out_bias,  selection.weight};
  auto got = torch::autograd::grad({y}, leaves, {upstream.to(c.type)});
  auto want = torch::autograd::grad({expected}, leaves, {upstream.to(c.type).to(at::kDouble)});
  for (size_t i = 0; i < leaves.size(); ++i) checks::expect_close(got[i], want[i], 2 * c.tolerance);
}

INSTANTIATE_TEST_SUITE_P(Cases, SelfAttention,
                         testing::Values(Case{at::kDouble, 3, 70, 20, 4, 5, 2, true, false, 1e-12},
                                         Case{at::kDouble, 2, 9, 6, 3, 2, 3, false, true, 1e-12},
                                         Case{at::kFloat, 3, 137, 24, 4, 16, 2, true, false, 3e-5},
                                         Case{at::kFloat, 1, 65, 20, 4, 5, 3, false, true, 3e-5},
                                         Case{at::kBFloat16, 3, 137, 24, 4, 16, 2, true, false,
                                              3e-2},
                                         Case{at::kHalf, 2, 67, 24, 4, 8, 1, false, true, 5e-3},
                                         Case{at::kFloat, 0, 5, 16, 2, 8, 1, false, false, 0},
                                         Case{at::kFloat, 2, 1, 16, 2, 8, 1, false, false, 3e-5}));

// Sizes at which the packed kernels divide work up differently.
INSTANTIATE_TEST_SUITE_P(
    Packed, SelfAttention,
    testing::Values(Case{at::kFloat, 1, 1, 40, 3, 16, 2, false, false, 3e-5},     // a row
                    Case{at::kBFloat16, 1, 3, 40, 3, 16, 2, false, false, 3e-2},  // a few rows
                    Case{at::kFloat, 11, 9, 40, 3, 16, 2, true, false, 3e-5},     // short
                    Case{at::kBFloat16, 40, 7, 40, 3, 16, 1, true, false, 3e-2},
                    Case{at::kFloat, 1, 300, 40, 2, 8, 1, false, true, 3e-5},  // one head, rows
                    Case{at::kBFloat16, 2, 333, 24, 2, 8, 2, true, true, 3e-2},
                    Case{at::kFloat, 2, 600, 16, 2, 8, 1, true, false, 3e-5}));  // tiles of keys

TEST(SelectedSelfAttention, GivesTheSameForAnyNumberOfThreads) {
  at::manual_seed(5);
  const int before = at::get_num_threads();
  for (const int64_t length : {int64_t{1}, int64_t{9}, int64_t{150}}) {
    auto x = at::randn({3, length, 40}).requires_grad_(), in_weight = at::randn({144, 40}),
         out_weight = at::randn({40, 48});
    const auto selection = oracle::random_selection(3, 3, 2, at::kFloat);
    std::vector<Tensor> results;
    for (const int threads : {1, 2, 5}) {
      at::set_num_threads(threads);
      auto y = headwise::selected_self_attention(
          x, in_weight, {}, out_weight, {}, 3, selection.index, selection.count, selection.weight);
      auto gradient = torch::autograd::grad({y.square().sum()}, {x})[0];
      results.push_back(at::stack({y.detach(), gradient}));
    }
    EXPECT_TRUE(at::equal(results[0], results[1]));
    EXPECT_TRUE(at::equal(results[0], results[2]));
  }
  at::set_num_threads(before);
}

TEST(SelectedAttention, SharesKeysAndValuesAmongHeads) {
  at::manual_seed(3);
  auto q = at::randn({2, 6, 9, 4}, at::kDouble), k = at::randn({2, 2, 11, 4}, at::kDouble),
       v = at::randn({2, 2, 11, 5}, at::kDouble);
  auto selection = oracle::random_selection(2, 6, 4, at::kDouble);
  auto y =
      headwise::selected_attention(q, k, v, selection.index, selection.count, selection.weight);
  auto expected = oracle::attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)) *
                  oracle::dense_weight(selection).unsqueeze(-1).unsqueeze(-1);
  checks::expect_close(y, expected, 1e-12);
}

TEST(SelectedMultiheadAttention, EqualsTheSelfFormOnTheSameInput) {
  at::manual_seed(4);
  auto x = at::randn({2, 7, 8}, at::kDouble), w = at::randn({24, 8}, at::kDouble),
       b = at::randn({24}, at::kDouble), out = at::randn({8, 8}, at::kDouble);
  auto selection = oracle::random_selection(2, 4, 2, at::kDouble);
  headwise::ProjectionWeights weights;
  weights.q_weight = w.slice(0, 0, 8), weights.k_weight = w.slice(0, 8, 16);
  weights.v_weight = w.slice(0, 16, 24), weights.q_bias = b.slice(0, 0, 8);
  weights.k_bias = b.slice(0, 8, 16), weights.v_bias = b.slice(0, 16, 24);
  weights.out_proj_weight = out;
  auto general = headwise::selected_multihead_attention(x, x, x, weights, 4, selection.index,
                                                        selection.count, selection.weight);
  auto self = headwise::selected_self_attention(x, w, b, out, {}, 4, selection.index,
                                                selection.count, selection.weight);
  EXPECT_TRUE(at::equal(general, self));
}

TEST(SelectedAttention, RefusesBadInputInOneSentence) {
  auto q = at::zeros({1, 2, 3, 4});
  auto index = at::tensor({0, 5}, at::kInt).view({1, 2}), count = at::full({1}, 2, at::kInt);
  EXPECT_THROW(headwise::selected_attention(q, q, q, index, count), c10::IndexError);
  EXPECT_THROW(headwise::selected_attention(q, q, q, index.to(at::kFloat), count), c10::TypeError);
  EXPECT_EQ(checks::error_of<c10::ValueError>(
                [&] { headwise::selected_attention(q, q.slice(3, 0, 3), q, index, count); }),
            "k must be [B, Hkv, S, d] with size 4 in dimension 3, got shape [1, 2, 3, 3]");
}

}  // namespace test_attention

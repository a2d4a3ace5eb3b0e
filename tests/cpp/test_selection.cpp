#include "headwise/selection.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

TEST(Selection, SelectAllListsEveryHead) {
  auto selection = headwise::select_all(2, 3, torch::kFloat);
  EXPECT_TRUE(torch::equal(selection.index, torch::tensor({{0, 1, 2}, {0, 1, 2}}, torch::kInt)));
  EXPECT_TRUE(torch::equal(selection.count, torch::tensor({3, 3}, torch::kInt)));
}

TEST(Selection, SelectHeadsKeepsTheLargestAscending) {
  auto relevance = torch::tensor({{0.1, 0.9, 0.5, 0.9}, {3., 2., 1., 0.}});
  auto index = headwise::select_heads(relevance, torch::tensor({2, 0}, torch::kInt));
  EXPECT_TRUE(torch::equal(index, torch::tensor({{1, 3, -1, -1}, {-1, -1, -1, -1}}, torch::kInt)));
}

TEST(Selection, TiesGoToTheLowerHead) {
  auto index = headwise::select_heads(torch::zeros({1, 5}), torch::tensor({3}));
  EXPECT_TRUE(torch::equal(index, torch::tensor({{0, 1, 2, -1, -1}}, torch::kInt)));
}

TEST(Selection, MaskHasOnesAtTheChosen) {
  auto relevance = torch::rand({16, 12});
  auto count = torch::randint(0, 13, {16}, torch::kInt);
  auto index = headwise::select_heads(relevance, count);
  auto mask = headwise::selection_mask(index, count, torch::kDouble);
  EXPECT_TRUE(torch::equal(mask.sum(1).to(torch::kInt), count));
  // Every chosen head is at least as relevant as every other.
  auto inf = std::numeric_limits<double>::infinity();
  auto kept = relevance.to(torch::kDouble).masked_fill(mask == 0, inf).amin(1);
  auto dropped = relevance.to(torch::kDouble).masked_fill(mask == 1, -inf).amax(1);
  EXPECT_TRUE((kept >= dropped).all().item<bool>());
}

TEST(Selection, RefusesNonFiniteRelevance) {
  auto relevance = torch::zeros({1, 2});
  relevance[0][1] = std::nan("");
  EXPECT_THROW(headwise::select_heads(relevance, torch::tensor({1})), c10::ValueError);
}

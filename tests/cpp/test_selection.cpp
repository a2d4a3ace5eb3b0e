#include <gtest/gtest.h>
#include <torch/torch.h>

#include "headwise/selection.h"

TEST(Selection, SelectAllListsEveryHead) {
  auto selection = headwise::select_all(2, 3, torch::kFloat);
  EXPECT_TRUE(torch::equal(selection.index, torch::tensor({{0, 1, 2}, {0, 1, 2}}, torch::kInt)));
  EXPECT_TRUE(torch::equal(selection.count, torch::tensor({3, 3}, torch::kInt)));
}

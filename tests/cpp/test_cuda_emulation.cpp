// The index logic of the CUDA kernels, run thread by thread on the host: the functions are the ones
// that the kernels call (src/kernels/cuda/indexing.h).
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <numeric>
#include <random>

#include "headwise/selection.h"
#include "kernels/cuda/indexing.h"
#include "kernels/softmax_row.h"

namespace test_cuda_emulation {

using namespace headwise::kernels;
using namespace headwise::kernels::cuda;

struct List {
  std::vector<int32_t> batch, head, offset;
};

/// The kernel of work_list.cu: each phase by every thread, in a shuffled order between barriers.
List emulate_work_list(const torch::Tensor& index, const torch::Tensor& count, int64_t num_heads,
                       int64_t threads) {
  const WorkListShape shape{index.size(0), index.size(1), num_heads};
  const auto* heads = index.const_data_ptr<int32_t>();
  const auto* counts = count.const_data_ptr<int32_t>();
  std::vector<int64_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 generator(threads);
  const auto phase = [&](auto f) {
    std::shuffle(order.begin(), order.end(), generator);
    for (int64_t t : order) f(t);
  };
  std::vector<int32_t> slot(shape.slots(), 77), chosen(threads), at(threads);
  List list{std::vector<int32_t>(shape.capacity(), 77), std::vector<int32_t>(shape.capacity(), 77),
            std::vector<int32_t>(num_heads + 1, 77)};
  const WorkListOutput out{list.batch.data(), list.head.data(), list.offset.data()};
  phase([&](int64_t t) { clear_slots(shape, t, threads, slot.data(), out); });
  phase([&](int64_t t) { mark_slots(shape, t, threads, heads, counts, slot.data(), out); });
  phase([&](int64_t t) { chosen[t] = count_chunk(shape, t, threads, slot.data()); });
  std::exclusive_scan(chosen.begin(), chosen.end(), at.begin(), 0);
  const int32_t total = std::accumulate(chosen.begin(), chosen.end(), 0);
  phase([&](int64_t t) { write_chunk(shape, t, threads, slot.data(), at[t], total, out); });
  return list;
}

List plain_work_list(const torch::Tensor& index, const torch::Tensor& count, int64_t num_heads) {
  List list;
  for (int64_t h = 0; h < num_heads; ++h) {
    list.offset.push_back(list.batch.size());
    for (int64_t b = 0; b < index.size(0); ++b)
      for (int64_t n = 0; n < std::min<int64_t>(count[b].item<int>(), index.size(1)); ++n)
        if (index[b][n].item<int>() == h) {
          list.batch.push_back(b);
          list.head.push_back(h);
        }
  }
  list.offset.push_back(list.batch.size());
  list.batch.resize(index.numel(), -1);
  list.head.resize(index.numel(), -1);
  return list;
}

TEST(CudaEmulation, WorkListEqualsTheNestedLoops) {
  for (auto [B, H] : {std::pair{1, 1}, {5, 12}, {64, 16}, {3, 130}, {200, 16}, {0, 4}, {4, 0}})
    for (int64_t threads : {1, 32, 1024}) {
      const auto count = torch::randint(0, H + 1, {B}, torch::kInt);
      const auto index = headwise::select_heads(torch::rand({B, H}), count);
      const auto got = emulate_work_list(index, count, H, threads);
      const auto expected = plain_work_list(index, count, H);
      EXPECT_EQ(got.batch, expected.batch) << B << " " << H << " " << threads;
      EXPECT_EQ(got.head, expected.head);
      EXPECT_EQ(got.offset, expected.offset);
    }
}

TEST(CudaEmulation, WorkListLeavesOutWhatIsOutOfRange) {
  const auto index = torch::tensor({{0, 9, -5}, {1, 2, 0}}, torch::kInt);
  const auto count = torch::tensor({3, 50}, torch::kInt);  // 50: clamped to the columns
  const auto list = emulate_work_list(index, count, 3, 32);
  EXPECT_EQ(list.offset, (std::vector<int32_t>{0, 2, 3, 4}));
  EXPECT_EQ(list.batch, (std::vector<int32_t>{0, 1, 1, 1, -1, -1}));
  EXPECT_EQ(emulate_work_list(index, torch::tensor({-4, 0}, torch::kInt), 3, 32).offset.back(), 0);
  const auto twice = torch::tensor({{1, 1, 0}, {2, 0, 2}}, torch::kInt);
  EXPECT_EQ(emulate_work_list(twice, torch::tensor({3, 3}, torch::kInt), 3, 32).offset,
            (std::vector<int32_t>{0, 2, 3, 4}));
}

TEST(CudaEmulation, EveryThreadOfSelectHeadsAgreesWithSorting) {
  const double nan = std::nan("");
  const std::vector<double> row = {0.5, nan, 2,   2,
                                   -1,  nan, 0.5, -std::numeric_limits<double>::infinity()};
  const std::vector<int64_t> expected = {2, 3, 0, 6, 4, 7, 1, 5};  // NaN after every number
  const auto load = [&](int64_t h) { return row[h]; };
  for (int64_t place = 0; place < 8; ++place)
    EXPECT_EQ(selection_rank(load, expected[place], 8), place);
}

TEST(CudaEmulation, HeadCopyFollowsStridesAndGroups) {
  const int64_t B = 3, H = 4, R = 5, w = 6;
  const auto tensor = torch::arange(B * R * H * w).view({B, R, H, w}).transpose(1, 2);
  const HeadCopyShape shape{
      R, w, 2, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
  const std::vector<int32_t> batch = {2, 0, 1}, head = {1, 6, 7};  // of 8 query heads
  for (int64_t i = 0; i < 3 * R * w; ++i) {
    const int64_t pair = i / (R * w);
    const auto expected = tensor[batch[pair]][head[pair] / 2][i / w % R][i % w].item<int64_t>();
    EXPECT_EQ(tensor.const_data_ptr<int64_t>()[shape.offset(i, batch.data(), head.data())],
              expected);
  }
}

TEST(CudaEmulation, StatisticsTilesCoverEveryRowOnce) {
  for (auto [B, H, L] : {std::tuple{2, 3, 1}, {1, 2, 16}, {2, 1, 33}}) {
    std::vector<int> seen(B * H * L, 0);
    for (int64_t block = 0; block < B * H * statistics_row_tiles(L); ++block) {
      const auto tile = statistics_tile(block, H, L);
      for (int64_t i = tile.first_row; i < std::min<int64_t>(L, tile.first_row + kTileRows); ++i) {
        ++seen[(tile.b * H + tile.h) * L + i];
        EXPECT_GT(statistics_keys(tile, 100, true), i);
        EXPECT_EQ(statistics_keys(tile, 5, false), 5);
      }
    }
    EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
  }
}

TEST(CudaEmulation, LanesOfARowMergeToItsEntropy) {
  const int64_t S = 77;
  const auto scores = torch::randn({S}, torch::kDouble) * 5;
  const auto* s = scores.const_data_ptr<double>();
  const double hidden = -std::numeric_limits<double>::infinity();
  SoftmaxRow<double> lanes[kLanes];
  for (int64_t first = 0; first < S; first += kTileKeys)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int n = 0; n < kTileKeys / kLanes; ++n) {
        const int64_t j = first + n * kLanes + lane;
        lanes[lane].add(j < S ? s[j] : hidden);
      }
  for (int distance = 1; distance < kLanes; distance *= 2) {  // a butterfly, as the warp does it
    SoftmaxRow<double> next[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      next[lane] = SoftmaxRow<double>::merge(lanes[lane], lanes[lane ^ distance]);
    std::copy(next, next + kLanes, lanes);
  }
  const auto p = scores.softmax(0);
  const double entropy = -(p * p.log()).sum().item<double>() / std::log(double(S));
  for (const auto& lane : lanes) {
    EXPECT_EQ(lane.visible, S);
    EXPECT_NEAR(lane.normalized_entropy(), entropy, 1e-12);
    EXPECT_NEAR(lane.confidence(), p.max().item<double>(), 1e-12);
  }
}

TEST(CudaEmulation, RowsThatSeeOneKeyOrNone) {
  SoftmaxRow<float> row;
  EXPECT_EQ(row.normalized_entropy(), 0);
  EXPECT_EQ(row.confidence(), 0);
  row.add(-std::numeric_limits<float>::infinity());
  EXPECT_EQ(row.visible, 0);
  row.add(3e38f);
  EXPECT_EQ(row.normalized_entropy(), 0);
  EXPECT_EQ(row.confidence(), 1);
}

}  // namespace test_cuda_emulation

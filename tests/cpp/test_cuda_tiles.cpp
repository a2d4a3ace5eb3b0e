// Which block of the CUDA kernels does what: every piece of work exactly once. The kernels
// themselves run in tests/python/ops/test_emulated.py.
#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

#include "kernels/cuda/architectures.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/layer.h"

namespace test_cuda_tiles {

using namespace headwise::kernels::cuda;

TEST(CudaTiles, WhichDevicesCompiledCodeServes) {
  constexpr const char* kDefault = "80-real 90a-real 80-virtual";
  for (int capability : {80, 86, 89, 90, 100, 103, 110, 120, 121})
    EXPECT_TRUE(runs_on(kDefault, capability)) << capability;
  EXPECT_FALSE(runs_on(kDefault, 75));
  EXPECT_TRUE(runs_on("90a-real", 90));
  for (int capability : {80, 89, 100, 120}) EXPECT_FALSE(runs_on("90a-real", capability));
  EXPECT_TRUE(runs_on("86-real", 89));
  EXPECT_FALSE(runs_on("86-real", 80));
  EXPECT_FALSE(runs_on("89-real 90a-virtual", 100));  // PTX of one device
  EXPECT_TRUE(runs_on("100f-real", 103));
  EXPECT_FALSE(runs_on("100f-virtual", 120));
  EXPECT_TRUE(runs_on("100-virtual", 120));
  EXPECT_FALSE(runs_on("", 80));
}

TEST(CudaTiles, ProjectCoversEveryColumnOfEveryPartOnce) {
  ProjectArguments a{};
  a.chosen.batch = 3, a.chosen.columns = 5, a.width = 40, a.parts = 2;
  a.part[0].rows = 130, a.part[1].rows = 7;
  std::set<std::tuple<int64_t, int, int64_t, int64_t>> seen;
  const int64_t blocks = project_blocks(a, 128, 128);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto t = project_tile(a, i, 128, 128);
    EXPECT_TRUE(seen.emplace(t.b, t.part, t.row, t.column).second);
    EXPECT_LT(t.b, 3);
    EXPECT_LT(t.part, 2);
    EXPECT_LT(t.row, 130);
    EXPECT_LT(t.column, 200);
  }
  EXPECT_EQ(seen.size(), 3u * 2 * 2 * 2);  // two tiles of 130 rows, two of 200 columns
  a.chosen.columns = 0;
  EXPECT_EQ(project_blocks(a, 128, 128), 0);
}

TEST(CudaTiles, CombineWalksPartsHeadsAndPieces) {
  CombineArguments a{};
  a.chosen.batch = 2, a.width = 72, a.rows = 129, a.columns = 100, a.parts = 3;
  EXPECT_EQ(combine_blocks(a, 128, 64), 2 * 2 * 2);
  std::vector<std::tuple<int, int64_t, int64_t>> steps;
  for (int64_t s = 0; s < combine_steps(a, 2, 32); ++s) {
    const auto step = combine_step(a, s, 2, 32);
    steps.emplace_back(step.part, step.n, step.column);
  }
  size_t at = 0;
  for (int part = 0; part < 3; ++part)
    for (int64_t n = 0; n < 2; ++n)
      for (int64_t column : {0, 32, 64})
        EXPECT_EQ(steps.at(at++), (std::tuple<int, int64_t, int64_t>(part, n, column)));
  EXPECT_EQ(at, steps.size());
  EXPECT_EQ(combine_steps(a, 0, 32), 0);
}

TEST(CudaTiles, OuterSplitsCoverEveryRowOnce) {
  OuterArguments a{};
  a.chosen.num_heads = 4, a.width = 72, a.columns = 130, a.parts = 3, a.splits = 2;
  std::set<std::tuple<int64_t, int, int64_t, int64_t, int64_t>> seen;
  for (int64_t i = 0; i < outer_blocks(a, 64, 128); ++i) {
    const auto t = outer_tile(a, i, 64, 128);
    EXPECT_TRUE(seen.emplace(t.split, t.part, t.h, t.row, t.column).second);
  }
  EXPECT_EQ(seen.size(), 2u * 3 * 4 * 2 * 2);
  for (int64_t rows : {0, 1, 31, 32, 100, 517})
    for (int splits : {1, 2, 3, 16}) {
      int64_t next = 0;
      for (int z = 0; z < splits; ++z) {
        const auto range = split_rows(rows, splits, z, 32);
        EXPECT_EQ(range.first, next);
        EXPECT_GE(range.last, range.first);
        EXPECT_TRUE(range.first % 32 == 0 || range.first == rows);
        next = range.last;
      }
      EXPECT_EQ(next, rows);
    }
}

TEST(CudaTiles, PairsComeInTheOrderOfTheListAndEndWithIt) {
  // 2 sequences of 2 places; head 3 in both, head 1 in the second.
  const int32_t head[] = {3, -1, 1, 3}, slots[] = {2, 0, 3, -1}, first[] = {0, 1, 3};
  Chosen chosen{};
  chosen.batch = chosen.columns = 2, chosen.num_heads = 4;
  chosen.head = head, chosen.pair_slot = slots, chosen.first = first;
  const std::vector<std::tuple<int64_t, int64_t, int64_t>> pairs = {
      {1, 1, 1}, {0, 0, 3}, {1, 2, 3}};
  for (int64_t block = 0; block < 12; ++block) {
    const auto work = pair_tile(chosen, block, 3);
    if (block >= 9) {
      EXPECT_LT(work.pair.h, 0);
      continue;
    }
    EXPECT_EQ(std::tuple(work.pair.b, work.pair.place, work.pair.h), pairs[block / 3]);
    EXPECT_EQ(work.tile, 2 - block % 3);  // the last rows first
  }
}

TEST(CudaTiles, WhatAQueryMaySee) {
  PairAttentionArguments a{};
  a.queries = 10, a.keys = 8, a.causal = true;
  const int32_t limit[] = {5};
  a.limit = a.plain = limit;
  const Pair pair{0, 0, 0};
  auto view = key_view(a, pair);
  EXPECT_EQ(keys_end(a, view, 3), 3);
  EXPECT_EQ(keys_end(a, view, 9), 5);
  EXPECT_EQ(first_row(a, 4), 4);
  EXPECT_TRUE(unmasked(a, view, 4, 5));
  EXPECT_FALSE(unmasked(a, view, 3, 5));  // row 3 does not see key 4
  EXPECT_FALSE(unmasked(a, view, 9, 6));  // key 5 is padding
  EXPECT_EQ(masked_score(a, view, pair, 4, 4, 2.0), 2.0);
  EXPECT_EQ(masked_score(a, view, pair, 3, 4, 2.0), -INFINITY);
  EXPECT_EQ(masked_score(a, view, pair, 9, 5, 2.0), -INFINITY);
  EXPECT_EQ(masked_score(a, view, pair, 10, 0, 2.0), -INFINITY);  // no such row
  a.added = 2;  // keys 6 and 7 are outside every mask
  const int32_t fewer[] = {2};
  a.limit = a.plain = fewer;
  view = key_view(a, pair);
  EXPECT_EQ(keys_end(a, view, 1), 8);
  EXPECT_EQ(first_row(a, 4), 0);
  EXPECT_EQ(masked_score(a, view, pair, 0, 6, 2.0), 2.0);
  EXPECT_EQ(masked_score(a, view, pair, 9, 2, 2.0), -INFINITY);
  EXPECT_FALSE(unmasked(a, view, 9, 8));
  const int32_t three[] = {3};  // key 1 of five is hidden, one more has something added
  const bool forbid[] = {false, true, false, false, false, true};
  a.added = 0, a.keys = 6, a.limit = limit, a.plain = three, a.key_forbid = forbid;
  view = key_view(a, pair);
  EXPECT_FALSE(unmasked(a, view, 9, 5));
  EXPECT_EQ(masked_score(a, view, pair, 9, 1, 2.0), -INFINITY);
  EXPECT_EQ(masked_score(a, view, pair, 9, 2, 2.0), 2.0);
}

TEST(CudaTiles, KeysThatAMaskLeavesAlone) {
  const std::vector<bool> hidden = {false, true, false, false, true, true};
  for (int64_t threads : {1, 4}) {
    int32_t end = 0, plain = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const auto seen = visible_keys([&](int64_t j) { return hidden[j]; },
                                     [&](int64_t j) { return !hidden[j]; }, 6, t, threads);
      end = std::max(end, seen.end), plain += seen.plain;
    }
    EXPECT_EQ(end, 4);
    EXPECT_EQ(plain, 3);
  }
}

TEST(CudaTiles, DecodingSplitsCoverTheCache) {
  for (int64_t keys : {0, 1, 127, 4096, 4097, 32768})
    for (int64_t units : {0, 1, 8, 512}) {
      const auto shape = decode_shape(units, 1, keys, 2048);
      EXPECT_GE(shape.splits, 1);
      EXPECT_GE(shape.splits * shape.keys_each, keys);
      EXPECT_LT((shape.splits - 1) * shape.keys_each, std::max<int64_t>(keys, 1));
      EXPECT_EQ(shape.keys_each % 32, 0);
    }
  EXPECT_EQ(decode_shape(1, 8, 32768, 2048).splits, 256);
  PairAttentionArguments a{};
  a.chosen.batch = 2, a.chosen.num_heads = 12, a.group = 6, a.value_width = 10;
  const DecodeShape shape{3, 32};
  std::set<std::tuple<int64_t, int64_t, int64_t, int64_t>> seen;
  for (int64_t i = 0; i < decode_blocks(a, shape); ++i) {
    const auto t = decode_tile(a, shape, i);
    EXPECT_TRUE(seen.emplace(t.b, t.kv_head, t.pass, t.split).second);
    EXPECT_LT(t.kv_head, 2);
    EXPECT_LT(t.pass, 2);  // six heads in two passes of four
  }
  EXPECT_EQ(seen.size(), 2u * 2 * 2 * 3);
  EXPECT_EQ(decode_row(a, shape, 1, 11, 2) + 12, decode_scratch(a, shape));
}

}  // namespace test_cuda_tiles

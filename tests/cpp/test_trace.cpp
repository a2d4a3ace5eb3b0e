#include "checks.h"
#include "headwise/trace.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

using headwise::Selection;
using headwise::Trace;

namespace test_trace {

// Two sequences of a layer of four heads: {0, 2} and {2}.
Selection two_sequences() {
  return {at::tensor({0, 2, -1, -1, 2, -1, -1, -1}, at::kInt).view({2, 4}),
          at::tensor({2, 1}, at::kInt),
          at::tensor({1.0f, 0.0f, 0.5f, 0.0f, 0.0f, 0.0f, 2.0f, 0.0f}).view({2, 4}),
          at::arange(8, at::kFloat).view({2, 4}),
          {}};
}

TEST(Trace, SummariesFollowTheirDefinitions) {
  Trace trace;
  trace.record("a", 4, two_sequences());
  const auto summary = trace.summary("a");
  EXPECT_EQ(summary.sequences, 2);
  EXPECT_DOUBLE_EQ(summary.mean_heads, 1.5);
  EXPECT_DOUBLE_EQ(summary.mean_fraction, 0.375);
  EXPECT_DOUBLE_EQ(summary.std_fraction, 0.125);
  EXPECT_DOUBLE_EQ(summary.mean_jaccard_distance.value(), 0.5);

  trace.record("b", 4, two_sequences());
  const auto both = trace.summary().value();
  EXPECT_DOUBLE_EQ(both.mean_heads, 3.0);
  EXPECT_DOUBLE_EQ(both.mean_jaccard_distance.value(), 0.5);
  trace.record("b", 4, two_sequences());
  EXPECT_FALSE(trace.summary().has_value());  // layer b saw two more inputs
}

TEST(Trace, KeepsCallsApartAndCopiesThem) {
  Trace trace;
  Selection selection = two_sequences();
  trace.record("a", 4, selection);
  selection.weight.zero_();
  trace.record("a", 4, selection);
  ASSERT_EQ(trace.history("a").size(), 2u);
  EXPECT_EQ(trace.history("a")[0].weight[1][2].item<float>(), 2.0f);
  EXPECT_EQ(trace.history("a")[1].weight[1][2].item<float>(), 0.0f);
  EXPECT_EQ(trace.layers(), std::vector<std::string>{"a"});
  trace.clear();
  EXPECT_TRUE(trace.layers().empty());
}

TEST(Trace, WritesJson) {
  Trace trace;
  trace.record("a", 4, two_sequences());
  const auto document = nlohmann::json::parse(trace.to_json());
  EXPECT_EQ(document["format"], "headwise.trace");
  const auto& sequences = document["layers"][0]["calls"][0];
  EXPECT_EQ(sequences[0]["heads"], nlohmann::json({0, 2}));
  EXPECT_EQ(sequences[0]["weight"], nlohmann::json({1.0, 0.5}));
  EXPECT_EQ(sequences[1]["relevance"], nlohmann::json({4.0, 5.0, 6.0, 7.0}));
  EXPECT_TRUE(sequences[1]["budget"].is_null());
}

TEST(Trace, RefusesWhatDoesNotFit) {
  Trace trace;
  Selection selection = two_sequences();
  selection.count = selection.count.to(at::kLong);
  EXPECT_THROW(trace.record("a", 4, selection), c10::TypeError);
  selection = two_sequences();
  EXPECT_THROW(trace.record("a", 5, selection), c10::ValueError);
  selection.budget = at::ones({3});
  EXPECT_EQ(checks::error_of([&] { trace.record("a", 4, selection); }),
            "budget must have shape [2], got [3]");
  EXPECT_THROW(trace.history("a"), c10::IndexError);
  EXPECT_EQ(checks::error_of([&] { trace.num_heads("a"); }),
            "no selection was recorded for layer 'a'");
}

}  // namespace test_trace

#include "headwise/explain.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <nlohmann/json.hpp>

using namespace headwise;
using Json = nlohmann::json;

namespace {

/// Two gated layers and a classifier on their mean.
struct Classifier {
  std::vector<std::pair<std::string, MultiheadAttention>> layers;
  torch::nn::Linear out{nullptr};
  at::Tensor x = torch::randn({2, 5, 16});
  at::Tensor padding =
      torch::tensor({{false, false, false, false, false}, {false, false, false, true, true}});

  explicit Classifier(const std::optional<GateOptions>& gate) : out(16, 3) {
    for (const char* name : {"first", "second"}) {
      auto options = MultiheadAttentionOptions(16, 4).batch_first(true);
      if (gate) options.gate(*gate);
      MultiheadAttention layer(options);
      layer->eval();
      torch::NoGradGuard no_grad;
      if (layer->gate) {
        for (auto& parameter : layer->gate->parameters()) parameter.normal_();
        for (auto& item : layer->gate->named_buffers()) {
          if (item.key() == "feature_mean") item.value().normal_();
          if (item.key() == "feature_variance") item.value().uniform_(0.2, 2.0);
        }
      }
      layers.emplace_back(name, layer);
    }
  }

  at::Tensor operator()(const at::Tensor& rows) {
    auto y = x.index_select(0, rows);
    const auto mask = padding.index_select(0, rows);
    for (const auto& [name, layer] : layers) {
      y = y + std::get<0>(MultiheadAttention(layer)->forward(y, y, y, mask, false));
    }
    return out(y.select(1, 0));
  }
};

TEST(Explain, NumbersAddUpAndTheLayersAreLeftAsTheyWere) {
  torch::manual_seed(0);
  Classifier model(BudgetGateOptions().target(0.5));
  const auto gate = model.layers[0].second->gate;
  const auto forward = [&](const at::Tensor& rows) { return model(rows); };
  const auto document =
      Json::parse(explain(model.layers, 2, forward, ExplainOptions().all_maps(true).batch_size(3),
                          {}, {"a", "b", "c"}));
  EXPECT_EQ(document["format"], "headwise.explanation");
  EXPECT_EQ(model.layers[0].second->gate, gate);
  EXPECT_FALSE(model.layers[0].second->probe);
  ASSERT_EQ(document["inputs"].size(), 2);
  const int64_t lengths[] = {5, 3};
  for (int64_t b = 0; b < 2; ++b) {
    const Json& input = document["inputs"][b];
    EXPECT_EQ(input["heads"], 8);
    for (const Json& layer : input["layers"]) {
      EXPECT_EQ(layer["gate"]["rule"], "rank");
      EXPECT_LT(layer["gate"]["budget"]["attribution"]["completeness_error"].get<double>(), 1e-6);
      for (const Json& head : layer["heads"]) {
        double sum = head["constant"];
        for (const Json& share : head["shares"]) sum += share.get<double>();
        EXPECT_EQ(head["shares"].size(), lengths[b]);
        EXPECT_NEAR(sum, head["relevance"].get<double>(), 1e-5);
        EXPECT_EQ(head["attention"].size(), lengths[b]);
        EXPECT_TRUE(head["effect"].is_number());
      }
    }
  }
}

TEST(Explain, EffectsAreThoseOfTheSwitchedModel) {
  torch::manual_seed(1);
  Classifier model(std::nullopt);
  const auto forward = [&](const at::Tensor& rows) { return model(rows); };
  const auto document = Json::parse(explain(model.layers, 2, forward));
  const torch::NoGradGuard no_grad;
  const auto rows = torch::arange(2);
  const auto before = model(rows).log_softmax(1);
  model.layers[1].second->set_gate(FixedGateOptions().heads(std::vector<int64_t>{0, 1, 3}));
  const auto after = model(rows).log_softmax(1);
  for (int64_t b = 0; b < 2; ++b) {
    const Json& input = document["inputs"][b];
    const int64_t predicted = input["prediction"]["class"];
    EXPECT_EQ(predicted, before[b].argmax().item<int64_t>());
    EXPECT_NEAR(input["layers"][1]["heads"][2]["effect"].get<double>(),
                (before - after)[b][predicted].item<double>(), 1e-5);
    EXPECT_EQ(input["layers"][1]["gate"]["type"], "none");
  }
}

TEST(Explain, RefusesWhatDoesNotFit) {
  Classifier model(std::nullopt);
  const auto fails = [&](auto forward, const char* text, ExplainOptions options = {}) {
    try {
      explain(model.layers, 2, forward, options);
      FAIL() << "expected: " << text;
    } catch (const c10::ValueError& error) {
      EXPECT_NE(std::string(error.what_without_backtrace()).find(text), std::string::npos)
          << error.what_without_backtrace();
    }
    EXPECT_FALSE(model.layers[0].second->gate);
    EXPECT_FALSE(model.layers[0].second->probe);
  };
  fails([](const at::Tensor&) { return at::zeros({2, 3}); }, "forward must call the layers");
  fails([&](const at::Tensor& rows) { return model(rows).sum(1); },
        "logits must have shape [2, C]");
  fails([&](const at::Tensor& rows) { return model(rows); }, "maps name head 7 of site 0",
        ExplainOptions().maps(std::vector<SiteHead>{{0, 7}}));
  fails([&](const at::Tensor& rows) { return model(rows); }, "maps name site 5",
        ExplainOptions().maps(std::vector<SiteHead>{{5, 0}}));
}

TEST(Explain, AModelWithoutClassScoresHasNoEffects) {
  Classifier model(std::nullopt);
  const auto document = Json::parse(explain(model.layers, 2, [&](const at::Tensor& rows) {
    model(rows);
    return at::Tensor();
  }));
  EXPECT_TRUE(document["inputs"][0]["prediction"].is_null());
  EXPECT_TRUE(document["inputs"][0]["layers"][0]["heads"][0]["effect"].is_null());
}

}  // namespace

#include "headwise/explain.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

using namespace headwise;
using Json = nlohmann::json;

namespace test_explain {

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
          const auto ends = [&](const std::string& name) {
            return item.key().size() >= name.size() &&
                   item.key().compare(item.key().size() - name.size(), name.size(), name) == 0;
          };
          if (ends("feature_mean")) item.value().normal_();
          if (ends("feature_variance")) item.value().uniform_(0.2, 2.0);
          if (ends("score")) item.value().uniform_(0.5, 1.5);
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

/// Links the gates of the layers of one model.
struct Together : torch::nn::Module {
  explicit Together(const std::vector<std::pair<std::string, MultiheadAttention>>& layers) {
    for (const auto& [name, layer] : layers) register_module(name, layer);
    link_gates(*this);
  }
};

TEST(Explain, NumbersAddUpAndTheLayersAreLeftAsTheyWere) {
  torch::manual_seed(0);
  Classifier model(BudgetGateOptions().keep(0.5));
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

TEST(Explain, EveryGateSaysHowItDecidesAndWhatItKnows) {
  const std::vector<std::pair<GateOptions, std::string>> gates = {
      {SubsetGateOptions().k(3), "The heads of all layers with the largest scores run"},
      {SubsetGateOptions().k(2).scope("layer"), "The layer's heads with the largest scores run"},
      {RequestedBudgetGateOptions().budget(0.4), "The budget is requested at run time and divided"},
      {GumbelSigmoidGateOptions(), "A head runs if its relevance is above 0"},
      {SleepGateOptions(), "Training put the heads of all layers"},
      {ThresholdGateOptions().threshold(0.5).resolution(4.0).approximate(true),
       "Nothing was learned"},
      {SharedHeadsGateOptions().gate(BudgetGateOptions()).shared({1}),
       "Head 1 runs for every input; of the others: a network gives every input a budget"},
      {SharedHeadsGateOptions().gate(FixedGateOptions()).shared({0, 2}),
       "Heads 0 and 2 run for every input; of the others: the same heads run"},
  };
  for (const auto& [options, how] : gates) {
    SCOPED_TRACE(how);
    torch::manual_seed(3);
    Classifier model(options);
    const Together linked(model.layers);
    const auto forward = [&](const at::Tensor& rows) { return model(rows); };
    const auto document = Json::parse(explain(model.layers, 2, forward));
    const torch::NoGradGuard no_grad;
    const auto scores = model(torch::arange(2)).log_softmax(1);
    for (int64_t b = 0; b < 2; ++b) {
      const Json& input = document["inputs"][b];
      const int64_t predicted = input["prediction"]["class"];
      EXPECT_NEAR(input["prediction"]["log_probability"].get<double>(),
                  scores[b][predicted].item<double>(), 1e-5);
      for (const Json& layer : input["layers"]) {
        EXPECT_EQ(layer["gate"]["how"].get<std::string>().rfind(how, 0), 0u) << layer["gate"];
        int64_t on = 0;
        for (const Json& head : layer["heads"]) {
          on += head["on"].get<bool>();
          EXPECT_TRUE(head["effect"].is_number());
          if (head["shares"].is_null()) continue;
          double sum = head["constant"];
          for (const Json& share : head["shares"]) sum += share.get<double>();
          EXPECT_NEAR(sum, head["relevance"].get<double>(), 1e-5);
        }
        EXPECT_EQ(layer["gate"]["count"], on);
      }
    }
  }
}

TEST(Explain, HeadsOfAllLayersCompete) {
  torch::manual_seed(5);
  Classifier model(SubsetGateOptions().k(3));
  const Together linked(model.layers);
  const auto document =
      Json::parse(explain(model.layers, 2, [&](const at::Tensor& rows) { return model(rows); }));
  std::vector<bool> seen(9, false);
  for (const Json& layer : document["inputs"][1]["layers"]) {
    EXPECT_EQ(layer["gate"]["ranked"], 8);
    for (const Json& head : layer["heads"]) {
      seen[head["rank"].get<int64_t>()] = true;
      EXPECT_EQ(head["on"].get<bool>(), head["rank"].get<int64_t>() <= 3);
      EXPECT_EQ(head["on"].get<bool>(), head["margin"].get<double>() > 0);
    }
  }
  EXPECT_EQ(std::count(seen.begin(), seen.end(), true), 8);
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
  fails([](const at::Tensor&) { return at::zeros({2, 3}); }, "forward_fn must call the layers");
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

}  // namespace test_explain

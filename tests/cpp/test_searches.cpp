// Searches over the heads of a torch::nn::Module, where it is known what every head is worth; the
// numbers of whole models are compared with Python's in tests/python/cpp/test_cpp_analyses.py.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>

#include "calibration.h"
#include "checks.h"
#include "headwise/headwise.h"

namespace test_searches {

using headwise::MultiheadAttention;
using headwise::MultiheadAttentionOptions;

/// y = sum over layers and heads of a[layer][head] * x[head], exactly: sequences have one token, so
/// attention has no effect, and head h passes on feature h of its input.
struct PlantedImpl : torch::nn::Module {
  explicit PlantedImpl(const std::vector<std::vector<double>>& weights,
                       const std::optional<headwise::GateOptions>& gate = std::nullopt) {
    const auto heads = static_cast<int64_t>(weights[0].size());
    for (const auto& row : weights) {
      auto options =
          MultiheadAttentionOptions(heads, heads).bias(false).batch_first(true).dtype(at::kDouble);
      if (gate) options.gate(*gate);
      MultiheadAttention layer(options);
      const torch::NoGradGuard no_grad;
      layer->in_proj_weight.zero_();
      layer->in_proj_weight.slice(0, 2 * heads).copy_(at::eye(heads));
      layer->out_proj->weight.zero_();
      layer->out_proj->weight[0].copy_(at::tensor(row, at::kDouble));
      layers->push_back(layer);
    }
    register_module("layers", layers);
    eval();
  }

  at::Tensor forward(const at::Tensor& inputs) {  // [B, H] -> [B]
    const at::Tensor x = inputs.unsqueeze(1);     // [B, 1, H]
    at::Tensor y = at::zeros({x.size(0)}, at::kDouble);
    for (const auto& module : *layers) {
      auto* layer = module->as<headwise::MultiheadAttentionImpl>();
      y = y + std::get<0>(layer->forward(x, x, x, {}, false)).select(2, 0).select(1, 0);
    }
    return y;
  }

  torch::nn::ModuleList layers;
};
TORCH_MODULE(Planted);

const std::vector<std::vector<double>> kWeights{{3.0, 0.0, 1.0, -2.0}, {0.5, 4.0, 0.0, 0.25}};

struct Searches : testing::Test {
  Planted model{kWeights};
  headwise::AttentionLayers layers = headwise::attention_layers(*model);
  at::Tensor x = at::randn({12, 4}, at::kDouble);
  at::Tensor target = at::zeros({12}, at::kDouble);
  /// The square of the output, in batches of 4.
  headwise::BatchLoss loss_fn = [this](int64_t batch) {
    return (model->forward(x.slice(0, 4 * batch, 4 * batch + 4)) -
            target.slice(0, 4 * batch, 4 * batch + 4))
        .square();
  };
  at::Tensor outputs(int64_t layer, int64_t head) const {  // without one head; -1: the whole model
    at::Tensor y = at::zeros({12}, at::kDouble);
    for (int64_t l = 0; l < 2; ++l) {
      for (int64_t h = 0; h < 4; ++h) {
        if (l != layer || h != head) y = y + x.select(1, h) * kWeights[l][h];
      }
    }
    return y;
  }
};

TEST_F(Searches, LayersHaveTheNamesOfTheModel) {
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[0].first, "layers.0");
  EXPECT_EQ(layers[1].first, "layers.1");
  EXPECT_EQ(layers[0].second.ptr(), model->layers[0]);
  MultiheadAttention alone(MultiheadAttentionOptions(4, 2));
  ASSERT_EQ(headwise::attention_layers(*alone).size(), 1u);
  EXPECT_EQ(headwise::attention_layers(*alone)[0].first, "");
}

TEST_F(Searches, OverridesDecideWhatRunsAndLeaveNothingBehind) {
  layers[0].second->gate = headwise::make_gate(
      headwise::FixedGateOptions().heads(std::vector<int64_t>{0, 1, 2}), 4, 4, at::kDouble);
  const auto gate = layers[0].second->gate;
  std::vector<size_t> order;
  {
    headwise::Instrumented opened(layers);
    opened.override_with([&](size_t i, int64_t inputs, const at::TensorOptions& like,
                             const headwise::Choose& choose) {
      order.push_back(i);
      if (i == 1) return headwise::select_all(inputs, 4, like);  // without asking
      auto selection = choose();
      EXPECT_EQ(selection.count[0].item<int64_t>(), 3);  // the gate's
      selection.weight = selection.weight * 0;
      selection.count.zero_();
      selection.index.fill_(-1);
      return selection;
    });
    opened.override_with(
        [&](size_t i, int64_t, const at::TensorOptions&, const headwise::Choose& choose) {
          order.push_back(10 + i);
          return choose();
        });
    int probed = 0;
    opened.probe_with(
        [&](size_t, const headwise::AttentionProbe& probe) { probed += probe.context.defined(); },
        /*context=*/true);
    const at::Tensor second = outputs(-1, -1) - (x * at::tensor(kWeights[0], at::kDouble)).sum(1);
    EXPECT_TRUE(at::allclose(model->forward(x), second));
    EXPECT_EQ(probed, 2);
    EXPECT_EQ(order, (std::vector<size_t>{10, 0, 11, 1}));  // the later one is asked first
  }
  EXPECT_EQ(layers[0].second->gate, gate);
  EXPECT_FALSE(layers[1].second->gate || layers[1].second->probe ||
               layers[1].second->probe_context);
}

TEST_F(Searches, ScoresAreTheDerivativesByGates) {
  // dL/dxi_h = 2 y a_h x_h for an example; tokens are examples here.
  const auto options = headwise::ScoreOptions().normalize(false);
  const auto found = headwise::score_heads(layers, 3, loss_fn, {"michel", "entropy"}, options);
  const at::Tensor y = outputs(-1, -1);
  for (int64_t layer = 0; layer < 2; ++layer) {
    for (int64_t head = 0; head < 4; ++head) {
      const auto expected = (2 * y * kWeights[layer][head] * x.select(1, head)).abs().mean();
      EXPECT_NEAR(found.at("michel").values[layer][head], expected.item<double>(), 1e-9);
      EXPECT_EQ(found.at("entropy").values[layer][head], 0.0);  // one key
    }
  }
  for (const auto& parameter : model->parameters()) EXPECT_FALSE(parameter.grad().defined());
}

TEST_F(Searches, WhatIsRefusedLeavesTheLayersAlone) {
  EXPECT_EQ(checks::error_of([&] { headwise::score_heads(layers, 0, loss_fn); }),
            "batches must not be empty: there is nothing to score heads on");
  EXPECT_EQ(checks::error_of([&] { headwise::score_heads(layers, 1, loss_fn, {"size"}); }),
            "metrics must be of michel, entropy, attention_confidence, hies, got 'size'");
  EXPECT_EQ(checks::error_of(
                [&] { headwise::score_heads(layers, 1, [](int64_t) { return at::ones({4}); }); }),
            "loss_fn must run the model: none of its attention layers was called");
  EXPECT_EQ(checks::error_of(
                [&] { headwise::score_heads(layers, 1, [](int64_t) { return at::Tensor(); }); }),
            "loss_fn must return a floating tensor, one loss per example [B] or their mean, got no "
            "tensor");
  EXPECT_EQ(checks::error_of([&] {
              headwise::score_heads(layers, 1, [&](int64_t i) { return loss_fn(i) / 0.0; });
            }),
            "loss_fn must return a finite loss, got NaN or infinity");
  const auto flat = [this](int64_t batch) { return loss_fn(batch) * 0; };
  EXPECT_EQ(checks::error_of([&] { headwise::score_heads(layers, 3, flat); }),
            "michel is zero for every head: the loss does not depend on the heads");
  EXPECT_THROW(headwise::score_heads(
                   layers, 3, [&](int64_t) -> at::Tensor { throw std::runtime_error("stop"); }),
               std::runtime_error);
  for (const auto& [name, layer] : layers) {
    EXPECT_FALSE(layer->gate || layer->probe || layer->probe_context);
  }
}

TEST(Calibration, HalvingFindsTheNearest) {
  const auto stairs = [](double x) { return std::floor(10 * (1 - x)) / 10; };
  const auto found = headwise::nearest_by_halving(stairs, 0.3, 0.0, 1.0, 20, {0.0, stairs(0.0)});
  EXPECT_DOUBLE_EQ(found.value, 0.3);
  EXPECT_EQ(headwise::nearest_by_halving(stairs, 2.0, 0.0, 1.0, 5, {0.0, 1.0}).argument, 0.0);
  const auto run = [](double threshold) {  // three of four heads at least, from 2.5 on
    return headwise::GateUse{threshold < 2.5 ? 4 : 3, 4, 5.0};
  };
  EXPECT_EQ(headwise::find_threshold(run, 0.75), 2.5);
  EXPECT_EQ(checks::error_of([&] { headwise::find_threshold(run, 0.5); }),
            "keep=0.5 cannot be reached: the nearest share of heads is 0.7500 (threshold 2.5); "
            "min_heads of the gates allows no less");
}

TEST(Calibration, AThresholdThatFailsIsPutBack) {
  Planted model(kWeights, headwise::ThresholdGateOptions().min_heads(3));
  const auto layers = headwise::attention_layers(*model);
  auto* gate = dynamic_cast<headwise::ThresholdGateImpl*>(layers[0].second->gate.get());
  gate->threshold.fill_(0.7);
  const auto forward = [&] { model->forward(at::randn({4, 4}, at::kDouble)); };
  EXPECT_NE(checks::error_of([&] {
              headwise::calibrate_threshold(layers, forward, 0.25);
            }).find("keep=0.25 cannot be reached: the nearest share of heads is "),
            std::string::npos);
  EXPECT_NEAR(gate->threshold.item<double>(), 0.7, 1e-6);
  EXPECT_EQ(layers[0].second->gate.get(), gate);
  EXPECT_EQ(checks::error_of([&] { headwise::calibrate_threshold(layers, [] {}, 0.5); }),
            "forward_fn must run the model on at least one input");
  Planted plain(kWeights);
  EXPECT_EQ(checks::error_of([&] {
              headwise::calibrate_threshold(headwise::attention_layers(*plain), forward, 0.5);
            }),
            "layers must have a ThresholdGate, got none");
}

struct Policy : Searches {
  headwise::HeadScores ranking{"mine", {"layers.0", "layers.1"}, {{4, 3, 2, 1}, {1, 2, 3, 4}}};
  headwise::PolicyBatch batch{
      12,
      [this](const at::Tensor& rows) {  // logits y and -y: sure where |y| is large
        const at::Tensor y = model->forward(x.index_select(0, rows));
        return at::stack({y, -y}, 1);
      },
      {}};
};

TEST_F(Policy, StopsWhereItIsSureAndSaysWhy) {
  const headwise::ConfidencePolicy policy(
      layers, headwise::ConfidencePolicyOptions().ranking(ranking).threshold(0.8));
  const auto found = policy.predict(batch);
  const at::Tensor narrow = x.select(1, 0) * 3.0 + x.select(1, 3) * 0.25;  // heads 0 1, and 2 3
  for (int64_t row = 0; row < 12; ++row) {
    const double sure = 1 / (1 + std::exp(-2 * std::abs(narrow[row].item<double>())));
    EXPECT_NEAR(found.confidence[0][row].item<double>(), sure, 1e-5);
    EXPECT_EQ(found.stage[row].item<int64_t>(), sure >= 0.8 ? 0 : 1);
    EXPECT_EQ(found.total_heads()[row].item<int64_t>(), sure >= 0.8 ? 4 : 12);
    EXPECT_EQ(found.reason(row).find(sure >= 0.8 ? "stopped" : "widened") != std::string::npos,
              true);
    const at::Tensor y = sure >= 0.8 ? narrow : outputs(-1, -1);
    EXPECT_NEAR(found.logits[row][0].item<double>(), y[row].item<double>(), 1e-9);
  }
  EXPECT_FALSE(layers[0].second->gate);
}

TEST_F(Policy, FitsAndRefuses) {
  headwise::ConfidencePolicy policy(layers, headwise::ConfidencePolicyOptions().ranking(ranking));
  EXPECT_TRUE(std::isinf(policy.fit({batch}, 12.0)));
  EXPECT_LE(policy.fit({batch}, 8.0), 1.0);
  const auto fitted = policy.fit_accuracy({batch}, 0.0);
  EXPECT_EQ(fitted.accuracy, 1.0);  // of the widest stage's own predictions
  EXPECT_EQ(fitted.widest_heads, 8.0);
  EXPECT_EQ(fitted.pays(), fitted.heads < 8.0);
  EXPECT_EQ(checks::error_of([&] { policy.fit({}, 8.0); }),
            "batches must not be empty: there is nothing to fit a threshold on");
  EXPECT_EQ(checks::error_of([&] { headwise::ConfidencePolicy{layers}; }),
            "layer 'layers.0' has no relevance of its own: ranking must have scores for it");
  const auto options = headwise::ConfidencePolicyOptions().ranking(ranking);
  EXPECT_EQ(checks::error_of([&] {
              headwise::ConfidencePolicy(
                  layers, headwise::ConfidencePolicyOptions(options).factors({1, 1}));
            }),
            "factors must be positive and ascending, got [1, 1]");
  EXPECT_EQ(checks::error_of([&] {
              headwise::ConfidencePolicy(layers,
                                         headwise::ConfidencePolicyOptions(options).measure("x"));
            }),
            "measure must be one of probability, margin, entropy, got 'x'");
  auto broken = batch;
  broken.forward_fn = [&](const at::Tensor& rows) { return batch.forward_fn(rows) / 0.0; };
  EXPECT_EQ(checks::error_of([&] { policy.predict(broken); }),
            "forward_fn must return finite logits, got NaN or infinity");
  broken.forward_fn = [&](const at::Tensor& rows) { return batch.forward_fn(rows).slice(1, 0, 1); };
  EXPECT_EQ(checks::error_of([&] { policy.predict(broken); }),
            "forward_fn must return logits [B, C] of at least 2 classes, got shape [12, 1]");
}

}  // namespace test_searches

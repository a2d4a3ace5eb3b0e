#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>
#include <string>
#include <vector>

#include "checks.h"
#include "headwise/grouped_query_attention.h"
#include "oracle.h"

namespace test_grouped_query_attention {

using namespace headwise;
using Options = GroupedQueryAttentionOptions;

constexpr int64_t kDim = 12, kHeads = 6;

struct Rope {
  at::Tensor cos, sin;  // [1, L, r]
};

Rope rope(int64_t begin, int64_t length, int64_t width, at::TensorOptions options) {
  auto angle = at::arange(begin, begin + length, options).unsqueeze(1) /
               at::pow(50.0, at::arange(width / 2, options) / double(width));  // [L, r / 2]
  angle = at::cat({angle, angle}, -1).unsqueeze(0);
  return {angle.cos(), angle.sin()};
}

/// Turns features (i, i + r / 2) as complex numbers.
at::Tensor turned(const at::Tensor& heads, const Rope& rope) {
  const int64_t half = rope.cos.size(2) / 2;
  const auto cos = rope.cos.narrow(2, 0, half).unsqueeze(1),
             sin = rope.sin.narrow(2, 0, half).unsqueeze(1);
  const auto a = heads.narrow(3, 0, half), b = heads.narrow(3, half, half);
  return at::cat(
      {a * cos - b * sin, a * sin + b * cos, heads.narrow(3, 2 * half, heads.size(3) - 2 * half)},
      3);
}

/// Every head, multiplied by its weight. mask: floating, added to the scores.
at::Tensor oracle_output(const GroupedQueryAttention& layer, const at::Tensor& x,
                         const std::optional<Selection>& selection, const at::Tensor& mask,
                         const std::optional<Rope>& rope = {}, const at::Tensor& memory = {}) {
  const auto& o = layer->options;
  const int64_t heads = o.num_heads(), width = layer->head_dim();
  const auto project = [&](const at::Tensor& from, const torch::nn::Linear& linear,
                           const at::Tensor& norm) {
    auto made = at::linear(from, linear->weight, linear->bias)
                    .view({x.size(0), from.size(1), -1, width})
                    .transpose(1, 2);
    if (norm.defined()) {
      made = made * (made.square().mean(-1, true) + *o.qk_norm_eps()).rsqrt() * norm;
    }
    return made;
  };
  const auto& tokens = memory.defined() ? memory : x;
  auto q = project(x, layer->q_proj, layer->q_norm);
  auto k = project(tokens, layer->k_proj, layer->k_norm), v = project(tokens, layer->v_proj, {});
  if (rope) {
    q = turned(q, *rope);
    k = turned(k, *rope);
  }
  const auto groups = torch::tensor(layer->head_groups(), at::kLong);
  const auto scores =
      q.matmul(k.index_select(1, groups).transpose(2, 3)) * layer->scale() + mask;  // [B, H, L, S]
  auto context = scores.softmax(-1).matmul(v.index_select(1, groups));
  if (selection) {
    context =
        context *
        oracle::dense_weight(*selection).to(context.scalar_type()).unsqueeze(-1).unsqueeze(-1);
  }
  return at::linear(context.transpose(1, 2).reshape({x.size(0), x.size(1), heads * width}),
                    layer->o_proj->weight, layer->o_proj->bias);
}

at::Tensor causal(int64_t length, int64_t keys, at::TensorOptions options, int64_t window = 1000) {
  const auto position = at::arange(keys - length, keys).unsqueeze(1), key = at::arange(keys);
  return oracle::additive((key > position) | (key <= position - window),
                          c10::typeMetaToScalarType(options.dtype()));
}

GroupedQueryAttention make(Options options, at::ScalarType dtype = at::kDouble) {
  GroupedQueryAttention layer(options.dtype(dtype));
  const torch::NoGradGuard no_grad;
  for (auto& item : layer->named_parameters()) {
    if (item.key().find("gate") == std::string::npos) item.value().normal_(0.0, 0.5);
  }
  layer->eval();
  return layer;
}

class GroupedQuery : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }
};

void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance = 1e-9) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  EXPECT_TRUE(at::allclose(actual, expected, tolerance, tolerance))
      << (actual - expected).abs().max().item<double>();
}

std::vector<Options> layers() {
  const Options base(kDim, kHeads);
  return {
      base,
      Options(base).num_key_value_heads(1),
      Options(base).num_key_value_heads(3).bias(true).output_bias(false),
      Options(base).num_key_value_heads(2).head_dim(5).scale(0.7),
      Options(base).num_key_value_heads(2).qk_norm_eps(1e-5),
      Options(base).num_key_value_heads(3).key_value_heads(std::vector<int64_t>{0, 1, 1, 1, 2, 2}),
      Options(base).num_key_value_heads(2).sliding_window(2)};
}

std::vector<std::optional<GateOptions>> gates() {
  return {std::nullopt, FixedGateOptions().scale(std::vector<double>{1.5, 0, 1, 0, 0, 0.5}),
          RandomGateOptions().keep(0.4), GroupGateOptions().gate(RandomGateOptions().keep(0.5)),
          FixedGateOptions().scale(std::vector<double>(kHeads, 0.0))};
}

TEST_F(GroupedQuery, EqualsTheOracleWithGradients) {
  for (const auto& options : layers()) {
    for (const auto& gate : gates()) {
      auto layer = make(Options(options).gate(gate));
      std::optional<Selection> selection;
      layer->on_selection = [&](const Selection& chosen) { selection = chosen; };
      const auto x = torch::randn({3, 5, kDim}, at::kDouble).requires_grad_();
      const auto angles = rope(0, 5, layer->head_dim() / 2 * 2, at::kDouble);
      const auto cotangent = torch::randn_like(x);
      const auto gradients = [&](const at::Tensor& y) {
        std::vector<at::Tensor> inputs{x};
        for (const auto& item : layer->named_parameters()) inputs.push_back(item.value());
        return torch::autograd::grad({(y * cotangent).sum()}, inputs, {}, {}, false, true);
      };
      const auto [y, none] = layer->forward(x, {.cos = angles.cos, .sin = angles.sin});
      EXPECT_FALSE(none.defined());
      const auto mask = causal(5, 5, at::kDouble, options.sliding_window().value_or(1000));
      const auto expected = oracle_output(layer, x, selection, mask, angles);
      expect_close(y, expected);
      const auto own = gradients(y), plain = gradients(expected);
      for (size_t i = 0; i < own.size(); ++i) {
        if (own[i].defined() && plain[i].defined()) expect_close(own[i], plain[i], 1e-8);
        EXPECT_TRUE(own[i].defined() || !plain[i].defined());
      }
    }
  }
}

TEST_F(GroupedQuery, StepsWithACacheEqualOneCall) {
  for (const auto& options : layers()) {
    for (const bool keep : {false, true}) {
      for (const auto& gate :
           {std::optional<GateOptions>(),
            std::optional<GateOptions>(FixedGateOptions().heads(std::vector<int64_t>{1, 2}))}) {
        auto layer = make(Options(options).gate(gate).keep_selection(keep));
        const torch::NoGradGuard no_grad;
        const auto x = torch::randn({2, 6, kDim}, at::kDouble);
        const auto padding = at::zeros({2, 6}, at::kBool);
        padding[1].narrow(0, 0, 2).fill_(true);
        const auto angles = rope(0, 6, 2, at::kDouble);
        const auto [whole, weights] = layer->forward(x, {.cos = angles.cos,
                                                         .sin = angles.sin,
                                                         .key_padding_mask = padding,
                                                         .need_weights = true});
        KeyValueCache cache;
        for (int64_t begin = 0, end = 3; begin < 6; begin = end++) {
          const auto [y, w] =
              layer->forward(x.slice(1, begin, end), {.cos = angles.cos.slice(1, begin, end),
                                                      .sin = angles.sin.slice(1, begin, end),
                                                      .key_padding_mask = padding.slice(1, 0, end),
                                                      .cache = &cache,
                                                      .need_weights = begin == 4});
          expect_close(y, whole.slice(1, begin, end));
          if (w.defined()) expect_close(w, weights.slice(2, begin, end).slice(3, 0, end));
        }
        EXPECT_EQ(cache.size(), 6);
        EXPECT_EQ(cache.selection.has_value(), keep && gate.has_value());
      }
    }
  }
}

TEST_F(GroupedQuery, TheCacheHoldsTheGroupsOfTheSelection) {
  auto layer = make(Options(kDim, kHeads)
                        .num_key_value_heads(3)
                        .keep_selection(true)
                        .gate(GroupGateOptions().gate(RandomGateOptions().keep(0.3))));
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({8, 4, kDim}, at::kDouble),
             token = torch::randn({8, 1, kDim}, at::kDouble);
  KeyValueCache cache;
  layer->forward(x, {.cache = &cache});
  EXPECT_EQ(cache.k.sizes(), at::IntArrayRef({8, 1, 4, 2}));
  EXPECT_EQ(cache.slots.sizes(), at::IntArrayRef({8, 1}));
  const auto selection = *cache.selection;
  EXPECT_GT(std::get<0>(at::_unique(cache.slots)).size(0), 1);
  const auto [y, weights] = layer->forward(token, {.cache = &cache, .need_weights = true});
  const auto plain = make(Options(kDim, kHeads).num_key_value_heads(3));
  for (const auto& item : plain->named_parameters()) {
    item.value().copy_(layer->named_parameters()[item.key()]);
  }
  const auto mask = causal(5, 5, at::kDouble);
  const auto expected = oracle_output(plain, at::cat({x, token}, 1), selection, mask);
  expect_close(y, expected.slice(1, 4));
  expect_close(weights.sum(-1).squeeze(-1), oracle::dense_weight(selection).to(at::kDouble));

  // Rows move with their selection.
  const auto rows = torch::tensor({5, 0, 5}, at::kLong);
  cache.select_rows(rows);
  cache.crop(4);
  EXPECT_EQ(cache.size(), 4);
  EXPECT_TRUE(cache.selection->index.equal(selection.index.index_select(0, rows)));
  const auto again = std::get<0>(layer->forward(token.index_select(0, rows), {.cache = &cache}));
  expect_close(again, expected.slice(1, 4).index_select(0, rows));
  cache.crop(0);
  EXPECT_EQ(cache.size(), 0);
  EXPECT_FALSE(cache.selection.has_value());
}

TEST_F(GroupedQuery, HalfPrecision) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    auto layer =
        make(Options(64, 8).num_key_value_heads(2).keep_selection(true).gate(
                 GroupGateOptions().gate(FixedGateOptions().heads(std::vector<int64_t>{1}))),
             dtype);
    auto exact = std::dynamic_pointer_cast<GroupedQueryAttentionImpl>(layer->clone());
    exact->to(at::kDouble);
    const torch::NoGradGuard no_grad;
    for (auto& parameter : layer->parameters()) parameter.mul_(0.3);
    for (auto& parameter : exact->parameters()) parameter.mul_(0.3);
    const auto x = torch::randn({2, 9, 64}).to(dtype);
    KeyValueCache cache, exact_cache;
    for (int64_t begin = 0, end = 8; begin < 9; begin = end++) {
      const auto angles = rope(begin, end - begin, 8, at::kFloat);
      const auto part = x.slice(1, begin, end);
      const auto y = std::get<0>(layer->forward(
          part, {.cos = angles.cos.to(dtype), .sin = angles.sin.to(dtype), .cache = &cache}));
      const auto expected =
          std::get<0>(exact->forward(part.to(at::kDouble), {.cos = angles.cos.to(at::kDouble),
                                                            .sin = angles.sin.to(at::kDouble),
                                                            .cache = &exact_cache}));
      EXPECT_EQ(y.scalar_type(), dtype);
      expect_close(y.to(at::kDouble), expected, 0.05);
    }
    EXPECT_EQ(cache.k.sizes(), at::IntArrayRef({2, 1, 9, 8}));
  }
}

TEST_F(GroupedQuery, GatesAroundOthersChangeTheirType) {
  const auto inner = FixedGateOptions().heads(std::vector<int64_t>{1});
  for (const GateOptions& options :
       {GateOptions(GroupGateOptions().gate(inner)),
        GateOptions(SharedHeadsGateOptions().gate(inner).shared(std::vector<int64_t>{2}))}) {
    const auto gate = make_gate(options, kDim, 4);
    const auto x = torch::randn({2, 3, kDim}, at::kDouble);
    const auto before = gate->forward(x.to(at::kFloat));
    gate->to(at::kDouble);  // integer buffers too
    const auto after = gate->forward(x);
    EXPECT_TRUE(after.index.equal(before.index) && after.count.equal(before.count));
  }
}

TEST_F(GroupedQuery, CrossAttentionProjectsItsMemoryOnce) {
  auto layer = make(Options(kDim, kHeads)
                        .num_key_value_heads(2)
                        .bias(true)
                        .gate(FixedGateOptions().heads(std::vector<int64_t>{0, 4})));
  std::optional<Selection> selection;
  layer->on_selection = [&](const Selection& chosen) { selection = chosen; };
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 3, kDim}, at::kDouble),
             memory = torch::randn({2, 5, kDim}, at::kDouble);
  const auto padding = at::zeros({2, 5}, at::kBool);
  padding[0][4] = true;
  const auto mask = oracle::additive(padding, at::kDouble).unsqueeze(1).unsqueeze(1);
  KeyValueCache cache;
  GroupedQueryArguments call{
      .key_padding_mask = padding, .is_causal = false, .cache = &cache, .memory = memory};
  const auto first = std::get<0>(layer->forward(x, call));
  expect_close(first, oracle_output(layer, x, selection, mask, {}, memory));
  EXPECT_EQ(cache.size(), 5);
  call.memory = torch::zeros({2, 5, kDim}, at::kDouble);  // not read
  expect_close(std::get<0>(layer->forward(x, call)), first);
  EXPECT_EQ(cache.size(), 5);
}

TEST_F(GroupedQuery, ALayerWithoutHeadsCountsItsTokens) {
  auto layer = make(Options(kDim, 0).head_dim(2).bias(true));
  KeyValueCache cache;
  const torch::NoGradGuard no_grad;
  const auto y =
      std::get<0>(layer->forward(torch::randn({2, 3, kDim}, at::kDouble), {.cache = &cache}));
  expect_close(y, layer->o_proj->bias.expand({2, 3, kDim}));
  EXPECT_EQ(cache.size(), 3);
  EXPECT_EQ(std::get<0>(layer->forward(torch::randn({2, 1, kDim}, at::kDouble), {.cache = &cache}))
                .sizes(),
            at::IntArrayRef({2, 1, kDim}));
  EXPECT_EQ(cache.size(), 4);
}

TEST_F(GroupedQuery, GroupsRunTogether) {
  auto gate = std::dynamic_pointer_cast<GroupGateImpl>(
      make(Options(kDim, kHeads)
               .num_key_value_heads(3)
               .key_value_heads(std::vector<int64_t>{0, 1, 1, 1, 2, 2})
               .gate(GroupGateOptions().gate(BudgetGateOptions().budget(0.5))))
          ->gate);
  const auto place = torch::tensor({0, 1, 1, 1, 2, 2}, at::kLong);
  EXPECT_TRUE(gate->place.equal(place));
  torch::NoGradGuard no_grad;
  for (auto& parameter : gate->parameters()) parameter.normal_();
  const auto x = torch::randn({6, 3, kDim}, at::kDouble);
  const auto heads = gate->forward(x), groups = gate->gate->forward(x);
  EXPECT_TRUE(
      selection_mask(heads.index, heads.count, at::kDouble)
          .equal(selection_mask(groups.index, groups.count, at::kDouble).index_select(1, place)));
  expect_close(heads.weight, groups.weight.index_select(1, place));
  expect_close(heads.relevance, groups.relevance.index_select(1, place));
  gate->train();
  gate->forward(x);
  expect_close(gate->expected_heads, gate->gate->expected_heads * 2.0);
  // The most important group on average starts as the most relevant one.
  EXPECT_TRUE(gate->starts());
  gate->start_from(torch::tensor({0.0, 1.0, 1.0, 1.0, 2.5, 0.0}, at::kDouble), 0.5);
  const auto& inner = dynamic_cast<BudgetGateImpl&>(*gate->gate);
  EXPECT_EQ(inner.base.argmax().item<int64_t>(), 2);
  // In MultiheadAttention each head is a group.
  const auto alone = make_gate(GroupGateOptions().gate(RandomGateOptions()), kDim, 4);
  EXPECT_TRUE(dynamic_cast<GroupGateImpl&>(*alone).place.equal(at::arange(4)));
}

TEST_F(GroupedQuery, GatesSeeOnlySomeTokens) {
  auto layer = make(Options(kDim, kHeads).gate(BudgetGateOptions().budget(0.5)));
  const torch::NoGradGuard no_grad;
  for (auto& parameter : layer->gate->parameters()) parameter.normal_();
  at::Tensor relevance;
  layer->on_selection = [&](const Selection& chosen) { relevance = chosen.relevance; };
  const auto x = torch::randn({2, 6, kDim}, at::kDouble);
  const auto of = [&](const at::Tensor& hidden) {
    return layer->gate->forward(x, hidden).relevance;
  };
  const auto padding = at::zeros({2, 6}, at::kBool);
  padding[1][0] = true;
  const auto all = of(padding);
  torch::nn::ModuleList model(layer);
  {
    const auto limited = gates_see(grouped_layers(*model), 2);
    layer->forward(x, {.key_padding_mask = padding});
    expect_close(relevance,
                 of(torch::tensor({{0, 0, 1, 1, 1, 1}, {1, 0, 0, 1, 1, 1}}).to(at::kBool)));
    {
      const auto tokens = torch::tensor({{1, 0, 0, 1, 0, 0}, {1, 1, 0, 0, 0, 0}}).to(at::kBool);
      const auto other = gates_see(grouped_layers(*model), tokens);
      layer->forward(x, {.key_padding_mask = padding});
      expect_close(relevance,
                   of(torch::tensor({{0, 1, 1, 0, 1, 1}, {1, 0, 1, 1, 1, 1}}).to(at::kBool)));
      EXPECT_EQ(checks::error_of([&] { layer->forward(x.slice(1, 1)); }),
                "tokens of gates_see must have shape [2, 5], as the layer's input, got [2, 6]");
    }
    layer->forward(x, {.key_padding_mask = padding});
    expect_close(relevance,
                 of(torch::tensor({{0, 0, 1, 1, 1, 1}, {1, 0, 0, 1, 1, 1}}).to(at::kBool)));
  }
  layer->forward(x, {.key_padding_mask = padding});
  expect_close(relevance, all);
  const auto layers = grouped_layers(*model);
  EXPECT_EQ(checks::error_of([&] { gates_see(layers, 0); }), "tokens must be positive, got 0");
  EXPECT_EQ(checks::error_of([&] { gates_see(layers, at::ones({2, 6})); }),
            "tokens must be boolean or a number, got Float");
  EXPECT_EQ(checks::error_of([&] { gates_see({}, 1); }), "layers must not be empty");
}

TEST_F(GroupedQuery, ClonesShareNothing) {
  for (const auto& options : layers()) {
    auto layer =
        make(Options(options).gate(GroupGateOptions().gate(BudgetGateOptions().budget(0.5))));
    if (options.bias()) layer->drop_bias("k_proj");
    const torch::NoGradGuard no_grad;
    const auto copy = std::dynamic_pointer_cast<GroupedQueryAttentionImpl>(layer->clone());
    const auto x = torch::randn({2, 4, kDim}, at::kDouble);
    const auto before = std::get<0>(layer->forward(x));
    expect_close(std::get<0>(copy->forward(x)), before, 0.0);
    for (auto& parameter : copy->parameters()) parameter.zero_();
    expect_close(std::get<0>(layer->forward(x)), before, 0.0);
    EXPECT_EQ(copy->named_parameters().keys(), layer->named_parameters().keys());
    torch::nn::ModuleList model(layer);
    EXPECT_EQ(grouped_layers(*std::dynamic_pointer_cast<torch::nn::ModuleListImpl>(model->clone()))
                  .size(),
              1u);
    layer->reset();
    EXPECT_FALSE(at::allclose(std::get<0>(layer->forward(x)), before));
  }
  std::ostringstream stream;
  stream << *make(layers()[2]);
  EXPECT_NE(stream.str().find("headwise::GroupedQueryAttention(embed_dim=12, num_heads=6, "
                              "num_key_value_heads=3, head_dim=2, bias=true, output_bias=false)"),
            std::string::npos)
      << stream.str();
}

TEST_F(GroupedQuery, SaysWhatIsWrong) {
  const Options base = Options(kDim, kHeads).num_key_value_heads(2);
  const auto refused = [](Options options) {
    return checks::error_of([&] { GroupedQueryAttention layer(options); });
  };
  EXPECT_EQ(refused(Options(base).num_key_value_heads(4)),
            "num_key_value_heads must divide num_heads=6, got 4");
  EXPECT_EQ(refused(Options(base).num_key_value_heads(0)),
            "num_key_value_heads must be positive, got 0");
  EXPECT_EQ(refused(Options(base).sliding_window(0)), "sliding_window must be positive, got 0");
  EXPECT_EQ(refused(Options(13, 6)),
            "num_heads must divide embed_dim=13 (or head_dim be given), got 6");
  EXPECT_EQ(refused(Options(base).key_value_heads(std::vector<int64_t>{0, 1})),
            "key_value_heads must have 6 numbers, one per query head, got 2");
  EXPECT_EQ(refused(Options(base).key_value_heads(std::vector<int64_t>{0, 1, 0, 1, 1, 1})),
            "key_value_heads must be ascending and name each of 2 key/value heads, got 0 for query "
            "head 2");
  EXPECT_EQ(refused(Options(base).key_value_heads(std::vector<int64_t>(6, 0))),
            "key_value_heads must name each of 2 key/value heads, got 1 of them");
  EXPECT_EQ(refused(Options(base).gate(ThresholdGateOptions())),
            "gate must choose by the layer's input, and this one reads queries and keys, which a "
            "layer with a cache does not have of every head");
  const auto group = GroupGateOptions().gate(BudgetGateOptions());
  EXPECT_EQ(refused(Options(base).gate(SharedHeadsGateOptions().gate(group))),
            "GroupGate must be a layer's gate itself, not inside another gate: a layer knows its "
            "groups");
  EXPECT_EQ(refused(Options(base).gate(GroupGateOptions())), "gate must be given");
  EXPECT_EQ(checks::error_of([&] { GroupGateImpl(group, kDim, std::vector<int64_t>{0, 2}); }),
            "groups must be ascending from 0 without gaps, got 2 for head 1");

  auto layer = make(Options(base).keep_selection(true).gate(RandomGateOptions()));
  const torch::NoGradGuard no_grad;
  const auto x = torch::randn({2, 3, kDim}, at::kDouble);
  const auto wrong = [&](GroupedQueryArguments call) {
    return checks::error_of([&] { layer->forward(x, call); });
  };
  EXPECT_EQ(checks::error_of([&] { layer->forward(x[0]); }),
            "x must have shape [B, L, 12], got [3, 12]");
  EXPECT_EQ(wrong({.cos = at::ones({1, 3, 2})}), "cos and sin must be given together, or neither");
  EXPECT_EQ(wrong({.cos = at::ones({1, 3, 4}), .sin = at::ones({1, 3, 4})}),
            "cos must have shape [2 or 1, 3, r] with one even r of at most 2, got [1, 3, 4]");
  EXPECT_EQ(wrong({.key_padding_mask = at::zeros({2, 4}, at::kBool)}),
            "key_padding_mask must have shape [2, 3], got [2, 4]");
  EXPECT_EQ(wrong({.key_padding_mask = at::zeros({2, 3}, at::kLong)}),
            "key_padding_mask must be boolean or floating, got Long");
  EXPECT_EQ(wrong({.query_padding_mask = at::zeros({2, 3})}),
            "query_padding_mask must be boolean, got Float");
  EXPECT_EQ(wrong({.attn_mask = at::zeros({2, 5, 3, 3})}),
            "attn_mask must be broadcastable to [2, 6, 3, 3], got [2, 5, 3, 3]");
  EXPECT_EQ(wrong({.memory = x}),
            "is_causal must be false and cos and sin undefined with memory: the positions of "
            "another sequence are not those of the queries");
  EXPECT_EQ(wrong({.is_causal = false, .memory = x[0]}),
            "memory must have shape [2, S, 12], got [3, 12]");
  KeyValueCache cache;
  cache.update(at::zeros({2, 2, 4, 2}, at::kDouble), at::zeros({2, 2, 4, 2}, at::kDouble));
  EXPECT_EQ(wrong({.cache = &cache}),
            "cache has 4 tokens and no selection of heads for them: with keep_selection begin with "
            "an empty one");
  EXPECT_EQ(checks::error_of([&] { layer->forward(x.narrow(0, 0, 1), {.cache = &cache}); }),
            "cache must hold 1 sequences, as x, got 2");
  EXPECT_EQ(cache.size(), 4);
  EXPECT_EQ(checks::error_of([&] { cache.crop(-1); }), "length must not be negative, got -1");
  EXPECT_EQ(checks::error_of([&] { layer->drop_bias("out"); }),
            "projection must be q_proj, k_proj, v_proj or o_proj, got out");
}

}  // namespace test_grouped_query_attention

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "explain/gate_reasons.h"
#include "explain/numbers.h"
#include "headwise/bootstrap.h"
#include "headwise/dense_attention.h"
#include "headwise/explain.h"
#include "probe_statistics.h"
#include "shown.h"

namespace headwise {
namespace {

constexpr const char* kFormat = "headwise.explanation";
constexpr int kVersion = 1;
constexpr int kMapDigits = 4;

using OptionalTensor = std::optional<at::Tensor>;

/// Positions of row `b` that are not padding, int64 [n].
at::Tensor visible(const OptionalTensor& mask, int64_t b, int64_t length) {
  if (!mask) return at::arange(length);
  return is_padding((*mask)[b]).logical_not().nonzero().flatten().to(at::kCPU);
}

/// Entropy and confidence of every head, float64 [B, H] each, on the host.
std::tuple<at::Tensor, at::Tensor> statistics(const AttentionProbe& probe) {
  const auto [entropy, confidence] = probe_statistics(probe);
  return {host(entropy), host(confidence)};
}

/// The attention of head `h` on input `b` [L, S'], float64 on the host.
at::Tensor attention_map(const AttentionProbe& probe, int64_t b, int64_t h) {
  const auto one = [&](const at::Tensor& t) { return t.narrow(0, b, 1).narrow(1, h, 1); };
  AttentionArguments arguments = probe.arguments;
  if (arguments.key_padding_mask) {
    arguments.key_padding_mask = arguments.key_padding_mask->narrow(0, b, 1);
  }
  if (arguments.attn_mask && arguments.attn_mask->dim() == 4) {
    const auto& mask = *arguments.attn_mask;
    arguments.attn_mask =
        one(mask.expand({probe.q.size(0), probe.q.size(1), mask.size(2), mask.size(3)}));
  }
  return host(
      attention_probabilities(one(probe.q), one(probe.k), arguments, probe.added_keys)[0][0]);
}

/// The largest weights of a map [queries, keys], largest first.
Json strongest_pairs(const at::Tensor& map, int64_t pairs) {
  Json list = Json::array();
  const int64_t columns = map.size(1);
  const auto [values, where] = map.flatten().topk(std::min(pairs, map.numel()));
  for (int64_t i = 0; i < values.numel(); ++i) {
    const int64_t at = where[i].item<int64_t>();
    list.push_back({{"query", at / columns},
                    {"key", at % columns},
                    {"weight", number(values[i].item<double>(), kMapDigits)}});
  }
  return list;
}

Json value_of(const at::Tensor& values, int64_t b) {
  return values.defined() ? number(values[b].item<double>()) : Json(nullptr);
}

Json value_of(const at::Tensor& values, int64_t b, int64_t h) {
  return values.defined() ? number(values[b][h].item<double>()) : Json(nullptr);
}

Json whole_of(const at::Tensor& values, int64_t b, int64_t h) {
  const double value = values.defined() ? values[b][h].item<double>() : NAN;
  return std::isfinite(value) ? Json(static_cast<int64_t>(value)) : Json(nullptr);
}

/// The shares of a head, null if the gate gives it none.
Json shares_of(const GateReasons& r, int64_t b, int64_t h, const at::Tensor& tokens) {
  if (!r.shares.defined() || !std::isfinite(r.constant[b][h].item<double>())) return nullptr;
  return numbers(r.shares[b][h].index_select(0, tokens));
}

Json gate_json(const GateReasons& r) {
  return {{"type", r.type},
          {"how", r.how},
          {"rule", r.rule},
          {"ranked", r.relevance.defined() ? Json(r.among) : Json(nullptr)},
          {"threshold", r.rule == "threshold" ? number(r.threshold) : Json(nullptr)},
          {"count", nullptr},
          {"budget", nullptr}};
}

Json budget_json(const GateReasons& r, int64_t b, const at::Tensor& tokens, int64_t steps) {
  Json json = {{"value", value_of(r.budget, b)},
               {"asked", value_of(r.asked, b)},
               {"min", r.min_budget},
               {"max", r.max_budget},
               {"attribution", nullptr}};
  if (r.attribution.defined()) {
    const auto each = r.attribution[b].index_select(0, tokens);  // [n]
    const double change = r.asked[b].item<double>() - r.baseline[b].item<double>();
    json["attribution"] = {
        {"method", "integrated gradients"},
        {"steps", steps},
        {"baseline", value_of(r.baseline, b)},
        {"tokens", numbers(each)},
        {"completeness_error", number(std::abs(each.sum().item<double>() - change), 3)}};
  }
  return json;
}

/// Rank correlation, at one site, between a gate's scores of the heads and the measured effects of
/// running them; null if either is missing or the same for all heads.
Json agreement_of(const Json& layer) {
  std::vector<double> relevance, effect;
  for (const Json& head : layer["heads"]) {
    if (head["relevance"].is_null() || head["effect"].is_null()) continue;  // a shared head
    relevance.push_back(head["relevance"].get<double>());
    effect.push_back(head["effect"].get<double>());
  }
  for (const auto& values : {relevance, effect}) {
    if (values.size() < 3) return nullptr;
    const auto [least, most] = std::minmax_element(values.begin(), values.end());
    if (*least == *most) return nullptr;
  }
  const auto both =
      at::stack({at::tensor(relevance, at::kDouble), at::tensor(effect, at::kDouble)});
  const auto value = std::get<0>(rank_agreement(both, "spearman", /*resamples=*/1));
  return number(value[0][1].item<double>(), kMapDigits);
}

/// The correlation at every site, and the mean: relevance is comparable only within a layer.
Json agreement_of(const std::vector<Json>& layers) {
  Json sites = Json::array();
  double sum = 0;
  int64_t known = 0;
  for (const Json& layer : layers) {
    sites.push_back(agreement_of(layer));
    if (!sites.back().is_null()) sum += sites.back().get<double>(), ++known;
  }
  if (known == 0) return nullptr;
  return {{"method", "spearman"},
          {"mean", number(sum / static_cast<double>(known), kMapDigits)},
          {"sites", std::move(sites)}};
}

/// The ranks of a layer's heads among all that they compete with.
void add_standing(Json& layer, const Contestant& one, const Standing& found, int64_t b) {
  layer["gate"]["ranked"] = found.among;
  for (int64_t place = 0; place < one.heads.numel(); ++place) {
    Json& head = layer["heads"][one.heads[place].item<int64_t>()];
    if (found.rank.defined()) head["rank"] = whole_of(found.rank, b, place);
    if (found.margin.defined()) head["margin"] = value_of(found.margin, b, place);
    if (found.budget_needed.defined())
      head["budget_needed"] = value_of(found.budget_needed, b, place);
  }
}

}  // namespace

struct Explanation::State {
  struct Site {
    std::string name;
    int64_t num_heads;
    at::Tensor weight, chosen;  // [B, H] float64 and bool, on the host
    std::optional<Contestant> contestant;
  };
  ExplainOptions options;
  std::vector<Site> sites;
  std::map<std::string, int64_t> calls;   // of each layer so far
  std::vector<Json> inputs;               // everything of an input except its layers
  std::vector<std::vector<Json>> layers;  // [input][site]
  at::Tensor log_probability;             // [B, C] float64 on the host
  at::Tensor predicted;                   // [B] int64

  /// The site and the head that a number among all heads refers to.
  SiteHead locate(int64_t head) const {
    int64_t site = 0;
    while (head >= sites[site].num_heads) head -= sites[site++].num_heads;
    return {site, head};
  }

  void start(int64_t batch) {
    inputs.assign(batch, {{"text", nullptr},
                          {"tokens", nullptr},
                          {"prediction", nullptr},
                          {"heads", 0},
                          {"heads_on", 0}});
    layers.resize(batch);
  }
};

Explanation::Explanation(ExplainOptions options) : state_(std::make_unique<State>()) {
  TORCH_CHECK_VALUE(options.pairs() >= 0, "pairs must not be negative, got ", options.pairs());
  TORCH_CHECK_VALUE(options.steps() > 0, "steps must be positive, got ", options.steps());
  state_->options = std::move(options);
}
Explanation::~Explanation() = default;
Explanation::Explanation(Explanation&&) noexcept = default;
Explanation& Explanation::operator=(Explanation&&) noexcept = default;

int64_t Explanation::num_inputs() const { return static_cast<int64_t>(state_->inputs.size()); }

int64_t Explanation::num_heads() const {
  int64_t heads = 0;
  for (const auto& site : state_->sites) heads += site.num_heads;
  return heads;
}

void Explanation::add_layer(const std::string& name, int64_t num_heads, const std::string& gate,
                            const NamedTensors& gate_tensors, const AttentionProbe& probe) {
  State& state = *state_;
  TORCH_CHECK_VALUE(probe.q.dim() == 4 && probe.q.size(1) == num_heads, "q of ", layer_called(name),
                    " must have shape [B, ", num_heads, ", L, d], got ", probe.q.sizes());
  const int64_t batch = probe.q.size(0), length = probe.q.size(2);
  const int64_t keys = probe.k.size(2) - probe.added_keys;
  if (state.sites.empty()) state.start(batch);
  TORCH_CHECK_VALUE(batch == num_inputs(), layer_called(name), " must see ", num_inputs(),
                    " inputs as the layers before it, got ", batch);
  const auto site = static_cast<int64_t>(state.sites.size());
  std::vector<bool> drawn(num_heads, state.options.all_maps());
  for (const auto& [where, head] : state.options.maps()) {
    if (where != site) continue;
    TORCH_CHECK_VALUE(head >= 0 && head < num_heads, "maps name head ", head, " of site ", site,
                      ", which has ", num_heads);
    drawn[head] = true;
  }
  const at::NoGradGuard no_grad;
  const GateReasons r =
      gate_reasons(gate, gate_tensors, probe, name, num_heads, state.options.steps());
  const auto [entropy, confidence] = statistics(probe);  // [B, H]
  const int64_t call = state.calls[name]++;
  for (int64_t b = 0; b < batch; ++b) {
    const auto queries = visible(probe.query_padding_mask, b, length);
    const auto seen =
        at::cat({visible(probe.arguments.key_padding_mask, b, keys),
                 at::arange(keys, keys + probe.added_keys)});  // the added ones are visible
    Json heads = Json::array();
    for (int64_t h = 0; h < num_heads; ++h) {
      const auto map = attention_map(probe, b, h).index_select(0, queries).index_select(1, seen);
      heads.push_back({{"head", h},
                       {"on", r.chosen[b][h].item<bool>()},
                       {"weight", value_of(r.weight, b, h)},
                       {"relevance", value_of(r.relevance, b, h)},
                       {"rank", whole_of(r.rank, b, h)},
                       {"margin", value_of(r.margin, b, h)},
                       {"budget_needed", value_of(r.budget_needed, b, h)},
                       {"constant", value_of(r.constant, b, h)},
                       {"shares", shares_of(r, b, h, queries)},
                       {"effect", nullptr},
                       {"changes_prediction", nullptr},
                       {"entropy", value_of(entropy, b, h)},
                       {"confidence", value_of(confidence, b, h)},
                       {"pairs", strongest_pairs(map, state.options.pairs())},
                       {"attention", drawn[h] ? numbers(map, kMapDigits) : Json(nullptr)},
                       {"roles", nullptr}});
    }
    Json gate_part = gate_json(r);
    if (r.count.defined()) gate_part["count"] = whole_of(r.count.unsqueeze(1), b, 0);
    if (r.budget.defined()) {
      gate_part["budget"] = budget_json(r, b, queries, state.options.steps());
    }
    const int64_t on = r.chosen[b].sum().item<int64_t>();
    state.inputs[b]["heads"] = state.inputs[b]["heads"].get<int64_t>() + num_heads;
    state.inputs[b]["heads_on"] = state.inputs[b]["heads_on"].get<int64_t>() + on;
    state.layers[b].push_back({{"site", site},
                               {"name", name},
                               {"call", call},
                               {"num_heads", num_heads},
                               {"queries", queries.numel()},
                               {"keys", seen.numel()},
                               {"gate", std::move(gate_part)},
                               {"heads", std::move(heads)}});
  }
  state.sites.push_back({name, num_heads, r.weight, r.chosen, r.contestant});
}

void Explanation::set_prediction(const at::Tensor& logits, const std::vector<std::string>& labels) {
  State& state = *state_;
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(0) == num_inputs() && logits.size(1) >= 2,
                    "logits must have shape [", num_inputs(), ", C] with C >= 2, got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(labels.empty() || static_cast<int64_t>(labels.size()) == logits.size(1),
                    "labels must have one entry per class (", logits.size(1), "), got ",
                    labels.size());
  const auto scores = host(logits);
  TORCH_CHECK_VALUE(at::isfinite(scores).all().item<bool>(), "logits must be finite");
  state.log_probability = scores.log_softmax(1);
  state.predicted = scores.argmax(1);
  for (int64_t b = 0; b < num_inputs(); ++b) {
    const int64_t predicted = state.predicted[b].item<int64_t>();
    state.inputs[b]["prediction"] = {
        {"class", predicted},
        {"label", labels.empty() ? Json(nullptr) : Json(labels[predicted])},
        {"log_probability", value_of(state.log_probability, b, predicted)},
        {"probabilities", numbers(state.log_probability[b].exp())},
        {"labels", labels.empty() ? Json(nullptr) : Json(labels)}};
  }
}

void Explanation::set_inputs(const std::vector<std::string>& texts,
                             const std::vector<std::vector<std::string>>& tokens) {
  const auto check = [&](const char* what, size_t given) {
    TORCH_CHECK_VALUE(given == 0 || static_cast<int64_t>(given) == num_inputs(), what,
                      " must have one entry per input (", num_inputs(), "), got ", given);
  };
  check("texts", texts.size());
  check("tokens", tokens.size());
  for (size_t b = 0; b < texts.size(); ++b) state_->inputs[b]["text"] = texts[b];
  for (size_t b = 0; b < tokens.size(); ++b) state_->inputs[b]["tokens"] = tokens[b];
}

std::vector<at::Tensor> Explanation::switched(int64_t input, int64_t begin, int64_t end) const {
  TORCH_CHECK_INDEX(input >= 0 && input < num_inputs(), "input must be in 0..", num_inputs() - 1,
                    ", got ", input);
  TORCH_CHECK_INDEX(0 <= begin && begin <= end && end <= num_heads(),
                    "begin and end must be in 0..", num_heads(), ", got ", begin, " and ", end);
  std::vector<at::Tensor> weights;
  for (const auto& site : state_->sites) {
    weights.push_back(site.weight[input].repeat({end - begin, 1}));  // [end - begin, H]
  }
  for (int64_t row = begin; row < end; ++row) {
    const auto [site, head] = state_->locate(row);
    const bool on = state_->sites[site].chosen[input][head].item<bool>();
    weights[site][row - begin][head] = on ? 0.0 : 1.0;
  }
  return weights;
}

void Explanation::add_effects(int64_t input, int64_t begin, const at::Tensor& logits) {
  State& state = *state_;
  TORCH_CHECK_VALUE(state.log_probability.defined(), "effects need a prediction: set it first");
  TORCH_CHECK_INDEX(input >= 0 && input < num_inputs(), "input must be in 0..", num_inputs() - 1,
                    ", got ", input);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) == state.log_probability.size(1) &&
                        begin >= 0 && begin + logits.size(0) <= num_heads(),
                    "logits of heads ", begin, " and on must have shape [N, ",
                    state.log_probability.size(1), "] with N <= ", num_heads() - begin, ", got ",
                    logits.sizes());
  const auto scores = host(logits);
  TORCH_CHECK_VALUE(at::isfinite(scores).all().item<bool>(), "logits must be finite");
  const auto log_probability = scores.log_softmax(1);
  const auto predicted = scores.argmax(1);
  const int64_t class_ = state.predicted[input].item<int64_t>();
  const double before = state.log_probability[input][class_].item<double>();
  for (int64_t row = 0; row < scores.size(0); ++row) {
    const auto [site, head] = state.locate(begin + row);
    Json& entry = state.layers[input][site]["heads"][head];
    const double change = log_probability[row][class_].item<double>() - before;
    // With the head minus without it, whichever of the two the model chose.
    entry["effect"] = number(entry["on"].get<bool>() ? -change : change);
    entry["changes_prediction"] = predicted[row].item<int64_t>() != class_;
  }
}

std::string Explanation::to_json(int indent) const {
  for (const auto& [site, head] : state_->options.maps()) {
    TORCH_CHECK_VALUE(site >= 0 && site < static_cast<int64_t>(state_->sites.size()),
                      "maps name site ", site, ", but the forward has ", state_->sites.size());
  }
  std::vector<std::optional<Contestant>> contestants;
  for (const auto& site : state_->sites) contestants.push_back(site.contestant);
  const auto found = standings(contestants);
  Json document = {{"format", kFormat}, {"version", kVersion}, {"inputs", Json::array()}};
  for (size_t b = 0; b < state_->inputs.size(); ++b) {
    Json input = state_->inputs[b];
    input["agreement"] = agreement_of(state_->layers[b]);
    input["layers"] = state_->layers[b];
    for (size_t site = 0; site < found.size(); ++site) {
      if (contestants[site]) {
        add_standing(input["layers"][site], *contestants[site], found[site],
                     static_cast<int64_t>(b));
      }
    }
    document["inputs"].push_back(std::move(input));
  }
  // Texts come from outside: bytes that are not UTF-8 must not stop the document.
  return document.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace headwise

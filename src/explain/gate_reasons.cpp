#include "explain/gate_reasons.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "explain/gate_words.h"
#include "explain/numbers.h"
#include "explain/relevance.h"
#include "headwise/selection.h"
#include "ops/gates/selection_ops.h"

namespace headwise {
namespace {

const at::Tensor* find(const NamedTensors& tensors, const char* name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? nullptr : &found->second;
}

/// The log_alpha above which HardConcreteGate runs a head in evaluation: hard_concrete above 0 or,
/// with weight one, P(open) above 1/2 (ops/gates/hard_concrete.cpp).
double hard_concrete_threshold(const Json& config) {
  const double edge = std::log(-config.value("gamma", -0.1) / config.value("zeta", 1.1));
  return config.value("kept_weight", "gate") == "one" ? config.value("beta", 0.33) * edge : edge;
}

/// The relevance above which a gate runs a head, if it decides by a threshold.
std::optional<double> threshold_of(const Json& config, const NamedTensors& tensors) {
  const std::string type = config.value("type", "");
  if (type == "HardConcreteGate") return hard_concrete_threshold(config);
  if (type == "GumbelSigmoidGate") return 0.0;  // P(open) of 1/2
  const at::Tensor* threshold = find(tensors, "threshold");
  if (threshold == nullptr || threshold->numel() != 1) return std::nullopt;
  return threshold->item<double>();
}

std::string rule_of(const std::string& type, const GateReasons& r) {
  if (type == "none" || type == "RandomGate") return type == "none" ? "none" : "random";
  if (!r.relevance.defined()) return "fixed";
  if (type == "SleepGate") return "awake";
  // A gate ranks its heads if no chosen head is less relevant than one that was not chosen.
  const at::Tensor margin = selection_margin(r.relevance, r.chosen);
  const at::Tensor misplaced = r.chosen.logical_and(margin.lt(0));
  return misplaced.any().item<bool>() ? "other" : "rank";
}

/// The relevance [B, H] above which each head runs, with the others unchanged, if all heads above
/// `threshold` run and always the `least` most relevant ones: one of these runs above the least-th
/// of the others. Minus infinity: it runs whatever its relevance.
at::Tensor cut_of_each(const at::Tensor& relevance, double threshold, int64_t least) {
  const int64_t heads = relevance.size(1);
  auto cut = at::full_like(relevance, threshold);
  if (least <= 0 || heads == 0) return cut;
  if (least >= heads) return cut.fill_(-std::numeric_limits<double>::infinity());
  const auto sorted = std::get<0>(relevance.sort(1, /*descending=*/true));  // [B, H]
  const auto last_in = sorted.narrow(1, least - 1, 1), best_out = sorted.narrow(1, least, 1);
  // Without one of the `least` heads, the next one takes its place.
  return at::minimum(cut, at::where(relevance.ge(last_in), best_out, last_in));
}

/// Names that gates give to the part of their relevance that does not depend on the input.
constexpr const char* kBases[] = {"base", "log_alpha", "logit", "scores", "score"};

/// Whether the parts add up to the relevance, within the rounding of the gate's own arithmetic,
/// which pools in the dtype of `x`.
bool make_up(const at::Tensor& sum, const at::Tensor& relevance, const at::Tensor& x) {
  const bool narrow = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  return sum.sizes() == relevance.sizes() &&
         at::allclose(sum, relevance, narrow ? 0.1 : 1e-2, narrow ? 0.1 : 1e-3);
}

/// The parts of the relevance, if the gate has the parameters of input_relevance (or of
/// static_relevance) and these reproduce its relevance: a gate with another formula is not
/// explained by this one.
void add_shares(const NamedTensors& tensors, const AttentionProbe& probe, GateReasons& r) {
  const at::Tensor* base = nullptr;
  for (const char* name : kBases) base = base == nullptr ? find(tensors, name) : base;
  const int64_t num_heads = r.relevance.size(1);
  if (base == nullptr || base->dim() != 1 || base->size(0) != num_heads) return;
  const at::Tensor *weight = find(tensors, "relevance.weight"),
                   *mean = find(tensors, "feature_mean"),
                   *variance = find(tensors, "feature_variance");
  if (weight && mean && variance) {
    if (weight->dim() != 2 || weight->size(0) != num_heads) return;
    const auto [shares, constant] =
        token_shares(probe.x, probe.query_padding_mask, *base, *weight, *mean, *variance);
    const auto parts = host(shares), rest = host(constant);
    if (find(tensors, "tilt")) {  // RequestedBudgetGate adds a part that depends on the request
      r.shares = parts, r.constant = r.relevance - parts.sum(2);
      return;
    }
    if (make_up(parts.sum(2) + rest, r.relevance, probe.x)) r.shares = parts, r.constant = rest;
  } else {
    const auto constant = host(*base).unsqueeze(0).expand_as(r.relevance);
    if (make_up(constant, r.relevance, probe.x)) r.constant = constant;
  }
}

void add_budget(const Json& config, const NamedTensors& tensors, const AttentionProbe& probe,
                int64_t steps, GateReasons& r) {
  r.min_budget = config.value("min_budget", 0.0);
  r.max_budget = config.value("max_budget", 1.0);
  const at::Tensor* hidden = find(tensors, "budget_hidden.weight");
  if (hidden == nullptr) return;
  const auto [attribution, baseline, asked] = budget_attribution(
      probe.x, probe.query_padding_mask, tensors.at("feature_mean"), tensors.at("feature_variance"),
      *hidden, tensors.at("budget_hidden.bias"), tensors.at("budget_out.weight"),
      tensors.at("budget_out.bias"), tensors.at("progress"), config.value("keep", 0.5),
      config.value("initial_keep", 0.95), config.value("warmup", 0.3), steps);
  r.attribution = host(attribution), r.baseline = host(baseline), r.asked = host(asked);
}

/// The tensors of a submodule, by their names in it.
NamedTensors within(const NamedTensors& tensors, const std::string& prefix) {
  NamedTensors found;
  for (const auto& [name, tensor] : tensors) {
    if (name.starts_with(prefix)) found[name.substr(prefix.size())] = tensor;
  }
  return found;
}

/// The reasons of a gate that does not wrap another. `r` holds its choice among its H heads, and
/// its relevance and budget if it has them; `heads` int64 [H] are their numbers in the layer.
void add_reasons(const Json& config, const NamedTensors& tensors, const AttentionProbe& probe,
                 const std::string& layer, const at::Tensor& heads, int64_t steps, GateReasons& r) {
  const std::string type = config.value("type", "unknown");
  const int64_t num_heads = heads.numel();
  r.rule = rule_of(type, r);
  if (const auto threshold = threshold_of(config, tensors); threshold && r.relevance.defined()) {
    r.rule = "threshold";
    r.threshold = *threshold;
  }
  if (r.relevance.defined()) {
    r.among = num_heads;
    r.rank = relevance_rank(r.relevance);
    if (r.rule == "threshold") {
      r.margin = r.relevance -
                 cut_of_each(r.relevance, r.threshold, config.value("min_heads", int64_t{0}));
    } else if (r.rule != "other") {
      r.margin = selection_margin(r.relevance, r.chosen);
    }
    add_shares(tensors, probe, r);
  }
  if (competes(type) && r.relevance.defined()) {
    Contestant one{layer, config, heads, r.relevance, r.chosen, {}, {}, {}};
    const at::Tensor *base = find(tensors, "base"), *tilt = find(tensors, "tilt");
    if (base && tilt && r.budget.defined()) {
      one.base = host(*base), one.tilt = host(*tilt), one.asked = r.budget;
    }
    if (type != "RequestedBudgetGate" || one.asked.defined()) r.contestant = std::move(one);
  } else if (r.budget.defined()) {
    const auto least = config.value("min_heads", int64_t{1});
    const std::string rounding = config.value("rounding", "round");
    const auto count = budget_count(r.budget.to(at::kFloat), num_heads, least, rounding);
    if (r.rank.defined() && at::equal(count.to(at::kLong), r.chosen.sum(1))) {
      r.budget_needed = budget_needed(r.rank, least, rounding);
    }
    add_budget(config, tensors, probe, steps, r);
  }
  if (r.rank.defined()) r.rank = host(r.rank);
}

/// [B, R, ...] of the heads `columns` [R] as [B, H, ...]; the other heads have NaN.
at::Tensor spread(const at::Tensor& part, const at::Tensor& columns, int64_t num_heads) {
  if (!part.defined()) return part;
  auto shape = part.sizes().vec();
  shape[1] = num_heads;
  return at::full(shape, std::numeric_limits<double>::quiet_NaN(), part.options())
      .index_copy(1, columns, part);
}

/// Shared heads always run; the gate inside sees only the others.
void add_shared_reasons(const Json& config, const NamedTensors& tensors,
                        const AttentionProbe& probe, const std::string& layer, int64_t num_heads,
                        int64_t steps, GateReasons& r) {
  auto is_routed = at::ones({num_heads}, at::kBool);
  if (const at::Tensor* shared = find(tensors, "shared")) {
    is_routed.index_fill_(0, shared->to(at::kCPU), 0);
  }
  const auto routed = is_routed.nonzero().flatten();  // [R]
  GateReasons inner;
  inner.chosen = r.chosen.index_select(1, routed);
  inner.budget = r.budget;
  const auto weight = r.weight.index_select(1, routed);
  const auto relevance = r.relevance.index_select(1, routed);
  // If a gate gives no relevance, the weights replace it.
  if (!at::equal(weight, relevance)) inner.relevance = relevance;
  add_reasons(config["gate"], within(tensors, "gate."), probe, layer, routed, steps, inner);
  const auto kept = [&](const at::Tensor& part) { return spread(part, routed, num_heads); };
  inner.chosen = r.chosen;
  inner.type = r.type, inner.weight = r.weight, inner.count = r.count;
  inner.relevance = kept(inner.relevance), inner.rank = kept(inner.rank);
  inner.margin = kept(inner.margin), inner.shares = kept(inner.shares);
  inner.constant = kept(inner.constant), inner.budget_needed = kept(inner.budget_needed);
  if (inner.contestant) {
    inner.budget_needed = at::full_like(r.weight, std::numeric_limits<double>::quiet_NaN());
  }
  if (inner.budget_needed.defined()) {
    inner.budget_needed.masked_fill_(is_routed.logical_not().unsqueeze(0), 0.0);
  }
  r = std::move(inner);
}

}  // namespace

GateReasons gate_reasons(const std::string& text, const NamedTensors& tensors,
                         const AttentionProbe& probe, const std::string& layer, int64_t num_heads,
                         int64_t steps) {
  GateReasons r;
  const int64_t batch = probe.q.size(0);
  const std::vector<int64_t> shape{batch, num_heads};
  if (!probe.selection) {
    r.type = r.rule = "none";
    r.how = how_it_decides(Json::object(), 0.0, false);
    r.chosen = at::ones(shape, at::kBool);
    r.weight = at::ones(shape, at::kDouble);
    return r;
  }
  const Json config = text.empty() ? Json::object() : parse_json(text, "gate");
  r.type = config.value("type", "unknown");
  const Selection& selection = *probe.selection;
  TORCH_CHECK_VALUE(selection.weight.sizes() == at::IntArrayRef(shape),
                    "weight of a selection must have shape ", at::IntArrayRef(shape), ", got ",
                    selection.weight.sizes());
  r.chosen = selection_mask(selection.index, selection.count, at::kFloat).gt(0).to(at::kCPU);
  r.weight = host(selection.weight);
  r.count = host(selection.count);
  if (selection.relevance.defined()) r.relevance = host(selection.relevance);
  if (selection.budget.defined()) r.budget = host(selection.budget);
  if (r.type == "SharedHeadsGate" && config.contains("gate") && r.relevance.defined()) {
    add_shared_reasons(config, tensors, probe, layer, num_heads, steps, r);
  } else {
    add_reasons(config, tensors, probe, layer, at::arange(num_heads), steps, r);
  }
  r.how = how_it_decides(text.empty() ? Json{{"type", r.type}} : config, r.threshold,
                         r.relevance.defined());
  return r;
}

}  // namespace headwise

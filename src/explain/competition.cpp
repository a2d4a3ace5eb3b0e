#include "explain/competition.h"

#include <ATen/ATen.h>

#include <map>

#include "explain/numbers.h"
#include "explain/relevance.h"
#include "ops/gates/budget.h"
#include "ops/gates/requested.h"
#include "ops/gates/selection_ops.h"
#include "ops/gates/sleep.h"

namespace headwise {
namespace {

/// Budgets that are tried to find the smallest at which a head runs.
constexpr int64_t kBudgets = 1000;

using Members = std::vector<const Contestant*>;  // layers, in order

/// The scores by which the scope's gates rank heads [B, R].
at::Tensor ranked_by(const Contestant& one) {
  if (one.config.value("type", "") != "SleepGate") return one.relevance;
  return held_score(one.relevance, one.chosen.to(at::kDouble), one.config.value("margin", 0.2));
}

/// The columns [B, R] of the `place`-th member, from the heads of all members side by side.
at::Tensor part_of(const at::Tensor& whole, const Members& members, size_t place) {
  int64_t start = 0;
  for (size_t i = 0; i < place; ++i) start += members[i]->heads.numel();
  return whole.narrow(-1, start, members[place]->heads.numel());
}

/// SubsetGate and SleepGate: this many heads, those with the largest scores.
std::vector<Standing> by_score(const Members& members) {
  std::vector<at::Tensor> scores, chosen;
  for (const auto* one : members) scores.push_back(ranked_by(*one)), chosen.push_back(one->chosen);
  const auto all = at::cat(scores, 1);  // [B, N]
  const auto rank = relevance_rank(all);
  const auto margin = selection_margin(all, at::cat(chosen, 1));
  const auto needed = budget_needed(rank, /*min_heads=*/1, "round");
  std::vector<Standing> found;
  for (size_t i = 0; i < members.size(); ++i) {
    found.push_back({all.size(1), host(part_of(rank, members, i)), part_of(margin, members, i),
                     part_of(needed, members, i)});
  }
  return found;
}

/// RequestedBudgetGate: a different request gives the layers different budgets, and shifts each
/// head's relevance by its tilt. For each head of `one`, the `place`-th member: the first budget of
/// a grid at which it runs.
Standing by_request(const Members& members, size_t place, const Contestant& one) {
  Standing standing;
  const int64_t heads = one.heads.numel(), batch = one.relevance.size(0);
  standing.among = heads;
  if (heads == 0) return standing;
  std::vector<at::Tensor> bases, tilts;
  for (const auto* each : members) bases.push_back(each->base), tilts.push_back(each->tilt);
  const auto grid =
      at::arange(1, kBudgets + 1, at::kDouble) / static_cast<double>(kBudgets);  // [G]
  const auto given = allocate_budget(at::cat(bases), at::cat(tilts), grid,
                                     /*progress=*/at::ones({}), /*training=*/false, 1.0, 1.0, 1.0);
  const auto share = part_of(given, members, place).sum(1) / static_cast<double>(heads);  // [G]
  const auto least = one.config.value("min_heads", int64_t{0});
  const auto count = budget_count(share, heads, least, "round");                   // [G]
  const auto moved = (grid.view({-1, 1}) - one.asked.view({1, -1})).unsqueeze(2);  // [G, B, 1]
  const auto relevance = one.relevance.unsqueeze(0) + one.tilt * moved;            // [G, B, R]
  const auto rank = relevance_rank(relevance.flatten(0, 1)).view({kBudgets, batch, heads});
  const auto runs = rank.le(count.view({-1, 1, 1}));  // [G, B, R]
  standing.budget_needed = grid.index({runs.to(at::kByte).argmax(0)});
  return standing;
}

}  // namespace

bool competes(const std::string& type) {
  return type == "SubsetGate" || type == "SleepGate" || type == "RequestedBudgetGate";
}

std::vector<Standing> standings(const std::vector<std::optional<Contestant>>& sites) {
  std::map<std::string, Members> groups;
  const auto key_of = [](const Contestant& one) {
    const bool of_model = one.config.value("scope", "layer") == "model";
    return of_model ? one.config.dump() : "layer " + one.layer;
  };
  const auto place_of = [](const Members& members, const Contestant& one) {
    size_t place = 0;
    while (place < members.size() && members[place]->layer != one.layer) ++place;
    return place;
  };
  for (const auto& site : sites) {
    if (!site) continue;
    Members& members = groups[key_of(*site)];
    if (place_of(members, *site) == members.size()) members.push_back(&*site);
  }
  std::map<std::string, std::vector<Standing>> scored;  // of gates that rank by scores
  std::vector<Standing> result;
  for (const auto& site : sites) {
    if (!site) {
      result.emplace_back();
      continue;
    }
    const std::string key = key_of(*site);
    const Members& members = groups[key];
    const size_t place = place_of(members, *site);
    if (site->config.value("type", "") == "RequestedBudgetGate") {
      result.push_back(by_request(members, place, *site));
      continue;
    }
    if (!scored.contains(key)) scored[key] = by_score(members);
    result.push_back(scored[key][place]);
  }
  return result;
}

}  // namespace headwise

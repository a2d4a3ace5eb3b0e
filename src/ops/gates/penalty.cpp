#include "ops/gates/penalty.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/gates/hard_concrete.h"

namespace headwise {
namespace {

bool share_target(const TargetTerm& a, const TargetTerm& b) {
  return a.type == b.type && a.form == b.form && a.keep == b.keep &&
         a.initial_keep == b.initial_keep && a.warmup == b.warmup && a.strength == b.strength;
}

at::Tensor pool_penalty(const std::vector<const TargetTerm*>& pool) {
  std::vector<at::Tensor> expected;
  std::vector<int64_t> heads;
  for (const auto* term : pool) {
    expected.push_back(term->expected_heads);
    heads.push_back(term->num_heads);
  }
  const auto& first = *pool.front();
  return target_penalty(expected, heads, first.progress, first.keep, first.initial_keep,
                        first.warmup, first.strength, first.form, first.multipliers);
}

}  // namespace

at::Tensor gates_penalty(const std::vector<TargetTerm>& terms,
                         const std::vector<at::Tensor>& others) {
  std::vector<std::vector<const TargetTerm*>> pools;
  std::vector<at::Tensor> own = others, sums;
  for (const auto& term : terms) {
    if (!term.pooled) {
      const auto penalty = pool_penalty({&term});
      own.push_back(term.regulariser ? penalty + *term.regulariser : penalty);
      continue;
    }
    const auto pool = std::find_if(pools.begin(), pools.end(), [&](const auto& members) {
      return share_target(*members.front(), term);
    });
    (pool == pools.end() ? pools.emplace_back() : *pool).push_back(&term);
    if (term.regulariser) own.push_back(*term.regulariser);
  }
  for (const auto& pool : pools) sums.push_back(pool_penalty(pool));
  const auto together = [](std::vector<at::Tensor>& parts) {
    for (auto& part : parts) part = part.to(parts.front().device());
    return at::stack(parts);
  };
  if (!own.empty()) sums.push_back(together(own).mean());
  return sums.empty() ? at::zeros({}) : together(sums).sum();
}

namespace {

at::Tensor gates_penalty_of_lists(
    at::TensorList expected_heads, at::IntArrayRef num_heads, const c10::List<std::string>& types,
    const c10::List<bool>& pooled, at::TensorList progress, at::ArrayRef<double> keep,
    at::ArrayRef<double> initial_keep, at::ArrayRef<double> warmup, at::ArrayRef<double> strength,
    const c10::List<std::string>& forms, const c10::List<std::optional<at::Tensor>>& multipliers,
    const c10::List<std::optional<at::Tensor>>& regularisers, at::TensorList others) {
  std::vector<TargetTerm> terms;
  for (size_t i = 0; i < expected_heads.size(); ++i) {
    terms.push_back({expected_heads[i], num_heads[i], types.get(i), pooled.get(i), progress[i],
                     keep[i], initial_keep[i], warmup[i], strength[i], forms.get(i),
                     multipliers.get(i), regularisers.get(i)});
  }
  return gates_penalty(terms, others.vec());
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("gates_penalty", gates_penalty_of_lists);
}

}  // namespace headwise

// A budget gate in evaluation, in one pass over the input: mean of the tokens that are not padding,
// relevance, budget and the top k. The formulas are those of kernels/budget_gate.h.
#pragma once

#include <cstdint>

#include "kernels/cpu/pooled_input.h"

namespace headwise::kernels {

/// T: the input, P: the parameters.
template <typename T, typename P>
struct BudgetGate : PooledInput<T> {
  using C = typename PooledInput<T>::C;
  int64_t heads, hidden;
  const C *mean, *variance;                                  ///< [D]
  const P *base, *relevance_weight;                          ///< [H], [H, D]
  const P *hidden_weight = nullptr, *hidden_bias = nullptr;  ///< [h, D], [h]; null: no network,
  const P *out_weight = nullptr, *out_bias = nullptr;        ///< [h], [1]; fixed_budget for all
  double fixed_budget, min_budget, max_budget;
  double progress, warmup, start_logit;  ///< see budget_of_logit()
  int64_t min_heads;
  bool round_up;

  int32_t *index, *count;  ///< [B, H], [B]
  T* weight;               ///< [B, H], 1 where chosen
  C *relevance, *budget;   ///< [B, H], [B]
};

/// Results are the same for any number of threads. Relevance that is not finite comes out as it is.
template <typename T, typename P>
void budget_gate(const BudgetGate<T, P>& gate);

}  // namespace headwise::kernels

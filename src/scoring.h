// Steps of pruning a model by scores, for headwise.pruning.
#pragma once

#include <cstdint>
#include <vector>

#include "headwise/export.h"
#include "headwise/importance.h"
#include "headwise/pruning.h"

namespace headwise {

/// How many heads of `total` are left after each step of a pruning path: each removes round(step *
/// total) heads, at least one, and round(keep * total), at least one, are left in the end.
/// @throws c10::ValueError if keep or step is outside (0, 1]
HEADWISE_API std::vector<int64_t> pruning_counts(int64_t total, double keep, double step);

/// The `count` heads of `before` that score best.
/// @param scores of the heads that `before` keeps, in their order, for each of its layers
/// @throws c10::ValueError if their number is wrong, and as plan
HEADWISE_API HeadPlan narrowed(const HeadPlan& before, const HeadScores& scores, int64_t count,
                               int64_t min_heads_per_layer = 0);

}  // namespace headwise

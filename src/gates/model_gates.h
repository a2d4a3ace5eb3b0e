// Linking gates that are not in one module.
#pragma once

#include <vector>

#include "headwise/gates.h"

namespace headwise {

/// The regulariser of these gates: penalty() of a model that has no others.
at::Tensor penalty_of(const std::vector<GateImpl*>& gates);

/// Links the gates of scope "model" among these; each set of equal options decides as one.
void link_gates(const std::vector<GateImpl*>& gates);

}  // namespace headwise

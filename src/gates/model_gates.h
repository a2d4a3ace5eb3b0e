// Linking gates that are not in one module.
#pragma once

#include <vector>

#include "headwise/gates.h"

namespace headwise {

/// Links the gates of scope "model" among these; each set of equal options decides as one.
void link_gates(const std::vector<GateImpl*>& gates);

}  // namespace headwise

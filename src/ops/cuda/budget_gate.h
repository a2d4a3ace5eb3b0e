// The budget gate of an evaluated layer in two launches (kernels/cuda/budget_gate.h).
#pragma once

#include "ops/budget_gate.h"

namespace headwise::ops::device {

/// True if the kernels take these dtypes and sizes.
bool takes_budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS);
GateResult budget_gate(HEADWISE_BUDGET_GATE_PARAMETERS);

}  // namespace headwise::ops::device

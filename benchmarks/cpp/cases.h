// The contenders: headwise's layer, gates and entropy, and what they are compared with.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "options.h"

namespace bench {

/// What was to be timed does not compute what it should.
struct CheckFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Emit = std::function<void(nlohmann::json)>;

/// One layer's forward, or its training step: one result for each number of heads, then the line
/// through them.
void layer_cases(const Options& options, const Shape& shape, at::ScalarType type, bool training,
                 const Emit& emit);

/// BudgetGate and HardConcreteGate over the dense layer; nothing for sequences under 128 tokens.
void gate_cases(const Options& options, const Shape& shape, at::ScalarType type, const Emit& emit);

void entropy_case(const Options& options, const Shape& shape, at::ScalarType type,
                  const Emit& emit);

}  // namespace bench

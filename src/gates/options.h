// Gates' options as JSON objects, and the rows of their tables.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/gate_options.h"

namespace headwise {

// Upper bounds of head numbers and of whole-number options: files contain them, and they determine
// allocations.
constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kLargest = (int64_t{1} << 31) - 1;
// Gates inside gates.
constexpr int kMostNested = 8;

HEADWISE_API nlohmann::ordered_json gate_options_to_object(const GateOptions& options);
HEADWISE_API GateOptions gate_options_from_object(const nlohmann::ordered_json& object,
                                                  int depth = 0);

/// ", keep=0.5" and so on, of the options that are not their defaults; a gate inside is left out.
std::string changed_options(const GateOptions& options);

/// One row of a gate's table.
struct OptionRow {
  std::string name;
  std::string type;  ///< as in Python: "float", "int | None", ...
  nlohmann::ordered_json initial;
  std::string rule;  ///< "in (0, 1]"; empty if the type is the only rule
  std::string doc;
};

/// {name of a gate, its options}, for every gate.
HEADWISE_API std::vector<std::pair<std::string, std::vector<OptionRow>>> gate_tables();

}  // namespace headwise

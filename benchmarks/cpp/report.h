// Results as lines on the terminal, and as the document that `headwise bench --json` writes too.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "options.h"
#include "timing.h"

namespace bench {

const char* name_of(at::ScalarType type);

nlohmann::json to_json(const Quartiles& quartiles);
/// The table of cases that the benchmarks share.
const nlohmann::json& table();
/// Whether `value` meets the goal of this name in the table.
nlohmann::json judge(const std::string& goal, double value);

/// The machine, in words.
nlohmann::json environment(const Options& options);

void print_header(const nlohmann::json& environment);
void print(const nlohmann::json& result);
/// How many results met each goal, and the worst; `goals` of the document.
nlohmann::json summary(const std::vector<nlohmann::json>& results);
void print_summary(const nlohmann::json& goals);

nlohmann::json document(const Options& options, const nlohmann::json& environment,
                        const std::vector<nlohmann::json>& results);

}  // namespace bench

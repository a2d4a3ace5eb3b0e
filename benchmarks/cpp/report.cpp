#include "report.h"
#include "table.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <torch/version.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "headwise/version.h"

namespace bench {

using nlohmann::json;

const char* name_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

json to_json(const Quartiles& q) {
  return {{"median", q.median}, {"low", q.low}, {"high", q.high}};
}

const json& table() {
  static const json parsed = json::parse(kTable);
  return parsed;
}

json judge(const std::string& goal, double value) {
  auto found = table().at("goals").at(goal);
  found["met"] = value <= found.at("limit").get<double>();
  return found;
}

json environment(const Options& options) {
  std::string processor = "unknown";
  std::ifstream cpus("/proc/cpuinfo");
  for (std::string line; std::getline(cpus, line);)
    if (line.rfind("model name", 0) == 0) {
      processor = line.substr(line.find(':') + 2);
      break;
    }
  json about{{"language", "C++"},
             {"processor", processor},
             {"cores", std::thread::hardware_concurrency()},
             {"instructions", at::get_cpu_capability()},
             {"device", "cpu"},
             {"torch", TORCH_VERSION},
             {"headwise", headwise::version()},
             {"threads", options.threads}};
  if (double load[3]; getloadavg(load, 3) == 3) about["load"] = {load[0], load[1], load[2]};
  if (!options.note.empty()) about["note"] = options.note;
  return about;
}

void print_header(const json& about) {
  std::printf("%s, %d cores, %s, torch %s", about["processor"].get<std::string>().c_str(),
              about["cores"].get<int>(), about["instructions"].get<std::string>().c_str(),
              about["torch"].get<std::string>().c_str());
  if (about.contains("load")) std::printf("; load average %.2f", about["load"][0].get<double>());
  std::printf("\n\n%-7s %14s %8s %3s %5s %12s %16s %6s %13s  goal\n", "", "B,L,D,H", "dtype", "thr",
              "heads", "headwise ms", "over", "ratio", "quartiles");
}

void print(const json& result) {
  const auto& s = result["shape"];
  const Shape shape{s[0], s[1], s[2], s[3]};
  const auto what = result["what"].get<std::string>();
  std::printf("%-7s %14s %8s %3d ", what.c_str(), shape.text().c_str(),
              result["dtype"].get<std::string>().c_str(), result["threads"].get<int>());
  if (what == "line") {
    std::printf("      %.2f ms + %.2f ms per head, R^2 %.4f (%s)\n",
                result["intercept"].get<double>(), result["slope"].get<double>(),
                result["r_squared"].get<double>(), result["of"].get<std::string>().c_str());
    std::fflush(stdout);
    return;
  }
  const auto own = result.value("gate", what == "entropy" ? "attention_entropy" : "headwise");
  const auto heads = result.contains("heads") ? std::to_string(result["heads"].get<int>()) : "";
  const auto& ratio = result["ratio"]["yardstick"];
  std::printf("%5s %12.3f %16.16s %6.3f %6.3f-%-6.3f", heads.c_str(),
              result["ms"][own]["median"].get<double>(),
              result["yardstick"].get<std::string>().c_str(), ratio["median"].get<double>(),
              ratio["low"].get<double>(), ratio["high"].get<double>());
  if (const auto& goal = result["goal"]; !goal.is_null())
    std::printf("  %s (<= %g)", goal["met"].get<bool>() ? "met" : "missed",
                goal["limit"].get<double>());
  if (result.contains("gate")) std::printf("  (%s)", own.c_str());
  for (const auto& [name, value] : result["ratio"].items())
    if (name != "yardstick")
      std::printf("  (over %s %.2f)", name.c_str(), value["median"].get<double>());
  std::printf("\n");
  std::fflush(stdout);
}

json summary(const std::vector<json>& results) {
  json goals = json::array();
  for (const auto& result : results) {
    if (!result.contains("goal") || result["goal"].is_null()) continue;
    const auto& goal = result["goal"];
    const double value = result["ratio"]["yardstick"]["median"];
    json* entry = nullptr;
    for (auto& known : goals)
      if (known["name"] == goal["name"]) entry = &known;
    if (!entry) {
      goals.push_back({{"name", goal["name"]},
                       {"limit", goal["limit"]},
                       {"met", 0},
                       {"of", 0},
                       {"worst", value}});
      entry = &goals.back();
    }
    auto& found = *entry;
    found["of"] = found["of"].get<int>() + 1;
    found["met"] = found["met"].get<int>() + (goal["met"].get<bool>() ? 1 : 0);
    found["worst"] = std::max(found["worst"].get<double>(), value);
  }
  return goals;
}

void print_summary(const json& goals) {
  std::printf("\n%-66s %5s %6s  met\n", "goal", "limit", "worst");
  for (const auto& goal : goals)
    std::printf("%-66s %5g %6.3f  %d of %d\n", goal["name"].get<std::string>().c_str(),
                goal["limit"].get<double>(), goal["worst"].get<double>(), goal["met"].get<int>(),
                goal["of"].get<int>());
}

json document(const Options& options, const json& environment, const std::vector<json>& results) {
  return {{"format", "headwise.bench"},
          {"version", 1},
          {"environment", environment},
          {"settings",
           {{"clock", options.process_clock ? "process" : "wall"},
            {"rounds", options.rounds},
            {"seed", options.seed},
            {"fractions", options.fractions}}},
          {"results", results},
          {"goals", summary(results)}};
}

}  // namespace bench

// Benchmarks of the C++ interface. Exit status 0, 1 (failed) or 2 (bad use).
#include <ATen/Parallel.h>

#include <cstdio>
#include <exception>
#include <fstream>

#include "cases.h"
#include "options.h"
#include "report.h"

namespace {

void run(const bench::Options& options) {
  const auto about = bench::environment(options);
  bench::print_header(about);
  std::vector<nlohmann::json> results;
  for (const auto& what : options.what)
    for (const auto& shape : options.shapes)
      for (const auto type : options.dtypes)
        for (const int threads : options.threads) {
          at::set_num_threads(threads);
          const auto emit = [&](nlohmann::json result) {
            result["what"] = result.value("what", what);
            result["shape"] = {shape.batch, shape.length, shape.width, shape.heads};
            result["dtype"] = bench::name_of(type);
            result["threads"] = threads;
            bench::print(result);
            results.push_back(std::move(result));
          };
          if (what == "gate")
            bench::gate_cases(options, shape, type, emit);
          else if (what == "entropy")
            bench::entropy_case(options, shape, type, emit);
          else
            bench::layer_cases(options, shape, type, what == "train", emit);
        }
  bench::print_summary(bench::summary(results));
  if (!options.json.empty()) {
    std::ofstream file(options.json);
    file << bench::document(options, about, results).dump(1) << "\n";
    if (!file) throw std::runtime_error("cannot write " + options.json);
  }
}

}  // namespace

int main(int count, char** words) {
  try {
    const auto options = bench::parse(count, words);
    if (options.help) {
      std::fputs(bench::kUsage, stdout);
      return 0;
    }
    run(options);
    return 0;
  } catch (const bench::UsageError& error) {
    std::fprintf(stderr, "headwise_bench: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "headwise_bench: %s\n", error.what());
    return 1;
  }
}

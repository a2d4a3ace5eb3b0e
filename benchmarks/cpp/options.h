// The command line of headwise_bench.
#pragma once

#include <ATen/core/ScalarType.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

/// B sequences of L tokens, width D, H heads.
struct Shape {
  int64_t batch, length, width, heads;
  std::string text() const;
};

struct Options {
  std::vector<std::string> what;  ///< of layer, train, gate and entropy
  std::vector<Shape> shapes;
  std::vector<at::ScalarType> dtypes{at::kFloat, at::kBFloat16};
  std::vector<int> threads{1};
  std::vector<double> fractions;  ///< of the heads that run
  int rounds = 11;
  double most_seconds = 0;     ///< a case's rounds end after so long; 0: no limit
  bool process_clock = false;  ///< processor time of all threads instead of wall time
  uint64_t seed = 0;
  std::string json;  ///< file to write; empty: none
  std::string note;  ///< stored in the results
  bool help = false;
};

/// A command line that cannot be followed; says why.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// @throws UsageError
Options parse(int count, char** words);

extern const char* const kUsage;

}  // namespace bench

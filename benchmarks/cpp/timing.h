// Times of contenders that take turns.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "options.h"

namespace bench {

struct Quartiles {
  double median, low, high;
};
Quartiles quartiles(std::vector<double> values);

/// Seconds of each round, by contender.
class Times {
 public:
  std::map<std::string, std::vector<double>> seconds;
  Quartiles milliseconds(const std::string& name) const;
  /// Of the two times of each round: they saw the same noise.
  Quartiles ratio(const std::string& name, const std::string& over) const;
  /// The one with the smallest median.
  std::string fastest(const std::vector<std::string>& names) const;
};

using Contenders = std::vector<std::pair<std::string, std::function<void()>>>;

/// Every contender once a round, in turn, after two rounds that are not timed; of the options: the
/// rounds, their limit and the clock. `before` runs ahead of each contender, not timed.
Times measure(const Contenders& contenders, const std::function<void()>& before,
              const Options& options);

/// The least-squares line through points.
struct Line {
  double slope, intercept, r_squared;
};
Line fit(const std::vector<double>& x, const std::vector<double>& y);

}  // namespace bench

#include "timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <numeric>

namespace bench {
namespace {

double now(bool process_clock) {
  if (process_clock) {
    std::timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace

Quartiles quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(values.size() - 1);
    const auto below = static_cast<size_t>(place);
    const auto above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
  };
  return {at(0.5), at(0.25), at(0.75)};
}

Quartiles Times::milliseconds(const std::string& name) const {
  auto values = seconds.at(name);
  for (auto& value : values) value *= 1e3;
  return quartiles(std::move(values));
}

Quartiles Times::ratio(const std::string& name, const std::string& over) const {
  constexpr double kFloor = 1e-9;  // a clock may not advance during a short call
  const auto &own = seconds.at(name), &other = seconds.at(over);
  std::vector<double> ratios(own.size());
  for (size_t i = 0; i < own.size(); ++i)
    ratios[i] = std::max(own[i], kFloor) / std::max(other[i], kFloor);
  return quartiles(std::move(ratios));
}

std::string Times::fastest(const std::vector<std::string>& names) const {
  return *std::min_element(names.begin(), names.end(), [&](const auto& a, const auto& b) {
    return milliseconds(a).median < milliseconds(b).median;
  });
}

Times measure(const Contenders& contenders, const std::function<void()>& before,
              const Options& options) {
  constexpr int kWarmUp = 2, kLeastRounds = 3;
  Times times;
  const double began = now(false);
  for (int turn = 0; turn < options.rounds + kWarmUp; ++turn) {
    if (options.most_seconds > 0 && turn >= kWarmUp + kLeastRounds &&
        now(false) - began > options.most_seconds)
      break;
    for (const auto& [name, run] : contenders) {
      before();
      const double begin = now(options.process_clock);
      run();
      const double end = now(options.process_clock);
      if (turn >= kWarmUp) times.seconds[name].push_back(end - begin);
    }
  }
  return times;
}

Line fit(const std::vector<double>& x, const std::vector<double>& y) {
  const double mx = mean(x), my = mean(y);
  double xx = 0, xy = 0, total = 0, left = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    xx += (x[i] - mx) * (x[i] - mx);
    xy += (x[i] - mx) * (y[i] - my);
    total += (y[i] - my) * (y[i] - my);
  }
  const double slope = xy / xx, intercept = my - slope * mx;
  for (size_t i = 0; i < x.size(); ++i) left += std::pow(y[i] - intercept - slope * x[i], 2);
  return {slope, intercept, total > 0 ? 1 - left / total : 1.0};
}

}  // namespace bench

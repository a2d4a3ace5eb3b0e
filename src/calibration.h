// The search for a threshold; the caller runs the model.
#pragma once

#include <cstdint>
#include <functional>

#include "headwise/export.h"

namespace headwise {

/// An argument of a function, and its value there.
struct Trial {
  double argument = 0;
  double value = 0;
};

/// Bisects [low, high] `passes` times. Of the arguments tried and `start`, the one whose value is
/// nearest to `target`; the earliest if several are equally near.
/// @param value a non-increasing function
HEADWISE_API Trial nearest_by_halving(const std::function<double(double)>& value, double target,
                                      double low, double high, int64_t passes, Trial start);

/// What gates selected in one pass over the calibration data.
struct GateUse {
  int64_t heads_run = 0;
  int64_t heads = 0;             ///< of the gates, over all inputs
  double highest_relevance = 0;  ///< of any head
};

/// The threshold with which gates run a share `keep` of the heads, found by halving between 0 and
/// the highest relevance. Driven by calibrate_threshold, here and in Python.
/// @param run       sets the gates' threshold and runs the model on all calibration data
/// @param keep      in (0, 1]
/// @param passes    trials
/// @param tolerance how far the share may be from `keep`; 1 accepts any
/// @throws c10::ValueError if keep or tolerance is out of range, `run` runs no gate, or the share
///         cannot be reached (the text names the nearest)
HEADWISE_API double find_threshold(const std::function<GateUse(double threshold)>& run, double keep,
                                   int64_t passes = 12, double tolerance = 0.1);

}  // namespace headwise

// Finding the one number that meets a target: the threshold of gates that are not trained.
#pragma once

#include <cstdint>
#include <functional>

#include "headwise/export.h"
#include "headwise/layers.h"

namespace headwise {

/// An argument and what a function gave for it.
struct Trial {
  double argument = 0;
  double value = 0;
};

/// Of the arguments that halving [low, high] tries `passes` times, and `start`, the one whose value
/// is nearest to `target`; the earlier of equally near ones.
/// @param value a function that does not grow
HEADWISE_API Trial nearest_by_halving(const std::function<double(double)>& value, double target,
                                      double low, double high, int64_t passes, Trial start);

/// Refuses a calibration that did not come near its target.
/// @throws c10::ValueError naming the nearest share, where that is further than `tolerance`
HEADWISE_API void check_calibrated(const Trial& nearest, double keep, double tolerance);

/// Sets the one threshold of all ThresholdGate gates among `layers` for a share of heads, as
/// headwise.calibrate_threshold does.
/// @param forward   runs the model, in evaluation mode, on all calibration data
/// @param keep      mean share of the heads of these layers that should run, in (0, 1]
/// @param passes    trials
/// @param tolerance how far the share may be from `keep`; 1 accepts any
/// @returns the threshold that the gates now have
/// @throws c10::ValueError if keep or tolerance is out of range, no layer has such a gate, forward
///         runs none, or the share cannot be reached (the text names the nearest); the gates then
///         keep their thresholds, as they do where forward throws
HEADWISE_API double calibrate_threshold(const AttentionLayers& layers,
                                        const std::function<void()>& forward, double keep,
                                        int64_t passes = 12, double tolerance = 0.1);

}  // namespace headwise

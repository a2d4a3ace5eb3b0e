// Finding the threshold of gates that are not trained.
#pragma once

#include <cstdint>
#include <functional>

#include "headwise/export.h"
#include "headwise/layers.h"

namespace headwise {

/// Sets the one threshold of all ThresholdGate gates among `layers` for a share of heads, as
/// headwise.calibrate_threshold does.
/// @param forward_fn runs the model, in evaluation mode, on all calibration data
/// @returns the threshold, also set in the gates
/// @throws c10::ValueError if keep or tolerance is out of range, nothing runs, the share cannot be
///         reached (the text names the nearest), or no layer has such a gate; the gates then keep
///         their thresholds, also if forward_fn throws
HEADWISE_API double calibrate_threshold(const AttentionLayers& layers,
                                        const std::function<void()>& forward_fn, double keep,
                                        int64_t passes = 12, double tolerance = 0.1);

}  // namespace headwise

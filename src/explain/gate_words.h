// How a gate decides, in one sentence.
#pragma once

#include <string>

#include "json.h"

namespace headwise {

/// @param config    the gate's configuration, an object without "type" if there is no gate
/// @param threshold of gates that have one
/// @param ranks     whether the gate gives heads a relevance
std::string how_it_decides(const Json& config, double threshold, bool ranks);

}  // namespace headwise

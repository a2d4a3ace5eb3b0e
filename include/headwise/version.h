#pragma once

#include <string>

#include "headwise/export.h"

namespace headwise {

/// "major.minor.patch" of the library that is loaded.
HEADWISE_API std::string version();

/// The torch version ("2.11.0") that the library was compiled against.
HEADWISE_API std::string compiled_torch_version();

}  // namespace headwise

// What can execute a selection here, and why the rest cannot.
#pragma once

#include <string>
#include <vector>

#include "headwise/export.h"

namespace headwise {

struct Backend {
  std::string name;
  std::string device;  ///< "cuda" or "cpu"
  bool available;      ///< can run on this machine, with this build
  std::string reason;  ///< why it cannot, or what is known of it
};

/// Every backend of the attention operators, for each device the fastest first: the order in which
/// they are tried.
HEADWISE_API std::vector<Backend> backends();

}  // namespace headwise

// What is thrown where the operating system refuses something about a file.
#pragma once

#include <string>
#include <system_error>

#include "headwise/export.h"

namespace headwise {

/// The operating system refused something about a file; OSError (by its errno) in Python.
class HEADWISE_API FileError : public std::system_error {
 public:
  /// @param action what was tried ("write"), @param path on what
  FileError(int error, const std::string& action, std::string path);
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
};

}  // namespace headwise

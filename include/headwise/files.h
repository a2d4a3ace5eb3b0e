// The exception for file errors of the operating system.
#pragma once

#include <string>
#include <system_error>

#include "headwise/export.h"

namespace headwise {

/// A file operation failed; OSError (by its errno) in Python.
class HEADWISE_API FileError : public std::system_error {
 public:
  /// @param action the attempted operation ("write"), @param path the file
  FileError(int error, const std::string& action, std::string path);
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
};

}  // namespace headwise

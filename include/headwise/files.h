// Files that are whole or not there: written beside their place, then renamed into it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
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

/// A file under construction. What is written goes to a hidden file beside `path`; commit() makes
/// it durable and renames it into place, so that readers see the old file or the new one. Without
/// commit() (an exception, a full disk) the destructor removes it. A symbolic link is followed; a
/// device or a pipe (/dev/stdout) is written directly.
class HEADWISE_API AtomicFile {
 public:
  /// @throws FileError if the folder does not exist or may not be written, or `path` is a folder
  /// @throws c10::ValueError if `path` is empty or holds a NUL
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// @throws FileError when the disk is full, or on any other failure
  void write(const void* data, size_t size);
  /// @throws FileError; the file at `path` is then what it was before
  void commit();

 private:
  std::string path_;    ///< where the file goes
  std::string beside_;  ///< where it is until then; empty for a device
  int descriptor_ = -1;
};

/// Replaces the file at `path` by `content`, whole or not at all.
/// @throws as AtomicFile
HEADWISE_API void write_atomic(const std::string& path, std::string_view content);

/// The bytes of a regular file.
/// @throws FileError if it cannot be read
/// @throws c10::ValueError if it is larger than `limit` bytes or not a regular file
HEADWISE_API std::string read_file(const std::string& path, size_t limit);

}  // namespace headwise

// An open file, and a regular file open for reading.
#pragma once

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "headwise/files.h"

namespace headwise {

/// Closes a file descriptor at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
  ~Descriptor() {
    if (valid()) ::close(descriptor_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  bool valid() const { return descriptor_ >= 0; }
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

/// A regular file: read by position, so that threads may share it. Reading, not mapping: a mapped
/// file that someone truncates kills the process with SIGBUS, here it is an exception.
class InputFile {
 public:
  // O_NONBLOCK: opening a pipe without a writer must not wait.
  explicit InputFile(std::string path)
      : path_(std::move(path)),
        descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    struct stat status;
    if (!descriptor_.valid() || ::fstat(descriptor_.get(), &status) != 0) {
      throw FileError(errno, "read", path_);
    }
    if (S_ISDIR(status.st_mode)) throw FileError(EISDIR, "read", path_);
    TORCH_CHECK_VALUE(S_ISREG(status.st_mode), "'", path_, "' must be a regular file");
    size_ = static_cast<size_t>(status.st_size);
  }

  size_t size() const { return size_; }

  void read(size_t offset, void* data, size_t size) const {
    char* bytes = static_cast<char*>(data);
    while (size > 0) {
      const ssize_t got = ::pread(descriptor_.get(), bytes, std::min<size_t>(size, 1u << 30),
                                  static_cast<off_t>(offset));
      if (got < 0) {
        if (errno == EINTR) continue;
        throw FileError(errno, "read", path_);
      }
      TORCH_CHECK_VALUE(got > 0, "'", path_, "' became shorter while it was read");
      bytes += got;
      offset += static_cast<size_t>(got);
      size -= static_cast<size_t>(got);
    }
  }

 private:
  std::string path_;
  Descriptor descriptor_;
  size_t size_ = 0;
};

}  // namespace headwise

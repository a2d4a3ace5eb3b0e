#include "files.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "descriptor.h"
#include "folders.h"
#include "json.h"
#include "shown.h"

namespace headwise {
namespace {

std::string place_beside(const std::string& path) {
  const auto slash = path.rfind('/');
  return path.substr(0, slash == std::string::npos ? 0 : slash + 1) + temporary_name();
}

void check_path(const std::string& path) {
  TORCH_CHECK_VALUE(!path.empty(), "path must not be empty");
  TORCH_CHECK_VALUE(path.find('\0') == std::string::npos, "path must not hold a NUL character");
}

/// A path that a system refuses as too long need not be shown whole.
std::string brief(const std::string& path) {
  return path.size() <= 250 ? path : path.substr(0, 100) + "...";
}

}  // namespace

// NOLINTNEXTLINE(performance-unnecessary-value-param): one copy per error does not matter.
FileError::FileError(int error, const std::string& action, std::string path)
    : std::system_error(error, std::generic_category(),
                        "cannot " + action + " " + shown_path(path)),
      path_(brief(path)) {}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  check_path(path);
  struct stat status;
  const bool exists = ::stat(path.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) throw FileError(EISDIR, "write", path);
  if (exists && !S_ISREG(status.st_mode)) {
    // Nothing can be renamed onto a device or a pipe without destroying it.
    descriptor_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    if (char target[PATH_MAX]; exists && ::realpath(path.c_str(), target) != nullptr)
      path_ = target;
    beside_ = place_beside(path_);
    descriptor_ = ::open(beside_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ >= 0 && exists) ::fchmod(descriptor_, status.st_mode & 07777);
  }
  if (descriptor_ < 0) throw FileError(errno, "write", path_);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  if (!beside_.empty()) ::unlink(beside_.c_str());
}

void AtomicFile::write(const void* data, size_t size) {
  const char* bytes = static_cast<const char*>(data);
  while (size > 0) {
    // Linux transfers at most 2^31 - 4096 bytes per call.
    const ssize_t written = ::write(descriptor_, bytes, std::min<size_t>(size, 1u << 30));
    if (written < 0) {
      if (errno == EINTR) continue;
      throw FileError(errno, "write", path_);
    }
    bytes += written;
    size -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  if (beside_.empty()) {
    const int closed = ::close(std::exchange(descriptor_, -1));
    if (closed != 0) throw FileError(errno, "write", path_);
    return;
  }
  // Some file systems cannot be synchronised and return EINVAL.
  if (::fsync(descriptor_) != 0 && errno != EINVAL) throw FileError(errno, "write", path_);
  if (std::rename(beside_.c_str(), path_.c_str()) != 0) throw FileError(errno, "write", path_);
  ::close(std::exchange(descriptor_, -1));
  sync_folder(folder_of(path_));
}

void write_atomic(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content.data(), content.size());
  file.commit();
}

std::string read_file(const std::string& path, size_t limit) {
  check_path(path);
  const InputFile file(path);
  TORCH_CHECK_VALUE(file.size() <= limit, shown_path(path), " must be at most ", limit,
                    " bytes, got ", file.size());
  std::string content(file.size(), '\0');
  file.read(0, content.data(), content.size());
  return content;
}

std::string read_json(const std::string& path, size_t limit) {
  std::string text = read_file(path, limit);
  parse_json(text, shown_path(path));
  return text;
}

}  // namespace headwise

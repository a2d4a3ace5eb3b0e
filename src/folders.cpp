#include "folders.h"
#include "files.h"

#include <fcntl.h>
#include <sys/syscall.h>

#include <climits>

#include "descriptor.h"

namespace headwise {
namespace {

/// Adds to the folder `to` what only `from` has: files as hard links or, with `move`, by moving
/// them; folders likewise. What cannot be linked or moved stays.
void add_missing(const std::string& from, const std::string& to, bool move) noexcept {
  DIR* folder = ::opendir(from.c_str());
  if (folder == nullptr) return;
  while (const dirent* entry = ::readdir(folder)) {
    const std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    const std::string source = from + "/" + name, place = to + "/" + name;
    struct stat status;
    if (::lstat(source.c_str(), &status) != 0) continue;
    if (!exists(place) && move && std::rename(source.c_str(), place.c_str()) == 0) continue;
    if (S_ISDIR(status.st_mode)) {
      if (::mkdir(place.c_str(), status.st_mode & 07777) == 0 || errno == EEXIST)
        add_missing(source, place, move);
    } else if (!move && ::linkat(AT_FDCWD, source.c_str(), AT_FDCWD, place.c_str(), 0) != 0) {
      continue;  // it is there, or it is moved later
    }
  }
  ::closedir(folder);
}

/// Swaps two folders in one step; false if the system or the file system cannot.
bool exchange(const std::string& one, const std::string& other) noexcept {
#ifdef SYS_renameat2
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE
  return ::syscall(SYS_renameat2, AT_FDCWD, one.c_str(), AT_FDCWD, other.c_str(), kExchange) == 0;
#else
  errno = ENOSYS;
  return false;
#endif
}

}  // namespace

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

void sync_folder(const std::string& path) noexcept {
  const Descriptor folder(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (folder.valid()) ::fsync(folder.get());
}

std::string through_links(std::string path) {
  constexpr int kMostLinks = 40;  // as the system allows
  for (int i = 0; i < kMostLinks; ++i) {
    char target[PATH_MAX];
    const ssize_t length = ::readlink(path.c_str(), target, sizeof target - 1);
    if (length < 0) break;
    const std::string named(target, static_cast<size_t>(length));
    const auto slash = path.rfind('/');
    path =
        named[0] == '/' || slash == std::string::npos ? named : path.substr(0, slash + 1) + named;
  }
  return path;
}

std::string folder_beside(const std::string& given) {
  const std::string target = through_links(given);
  for (;;) {
    std::string beside = folder_of(target) + "/" + temporary_name();
    if (::mkdir(beside.c_str(), 0777) == 0) return beside;
    if (errno != EEXIST) throw FileError(errno, "write", target);
  }
}

void replace_folder(const std::string& beside, const std::string& given) {
  const std::string target = through_links(given);
  constexpr int kTries = 100;  // against others that replace it at the same time
  for (int attempt = 0; attempt < kTries; ++attempt) {
    if (std::rename(beside.c_str(), target.c_str()) == 0)  // it was not there, or empty
      return sync_folder(folder_of(target));
    if (errno != ENOTEMPTY && errno != EEXIST) throw FileError(errno, "write", target);
    if (struct stat status; ::stat(target.c_str(), &status) == 0)
      ::chmod(beside.c_str(), status.st_mode & 07777);
    add_missing(target, beside, /*move=*/false);
    bool swapped = exchange(beside, target);
    if (!swapped && errno != ENOENT) {
      // No exchange on this file system: for a moment there is no folder.
      const std::string aside = folder_beside(target);
      swapped = std::rename(target.c_str(), aside.c_str()) == 0;
      if (swapped && std::rename(beside.c_str(), target.c_str()) != 0) {
        const int error = errno;
        std::rename(aside.c_str(), target.c_str());
        throw FileError(error, "write", target);
      }
      if (swapped) {
        add_missing(aside, target, /*move=*/true);
      }
      remove_folder(aside);
      if (swapped) return sync_folder(folder_of(target));
    } else if (swapped) {
      add_missing(beside, target, /*move=*/true);
      remove_folder(beside);
      return sync_folder(folder_of(target));
    }
  }
  throw FileError(EBUSY, "write", target);
}

}  // namespace headwise

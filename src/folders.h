// Folders, by POSIX calls. libtorch exports the std::filesystem of an older libstdc++, which takes
// the place of the compiler's own at link time: remove_all and directory iterators then crash. Only
// std::filesystem::path, which does not touch the disk, is safe beside it.
#pragma once

#include <dirent.h>
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "headwise/files.h"

namespace headwise {

inline bool exists(const std::string& path) {
  struct stat status;
  return ::lstat(path.c_str(), &status) == 0;
}

inline bool is_regular_file(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

/// Whether `path` is an empty folder.
inline bool is_empty_folder(const std::string& path) {
  DIR* folder = ::opendir(path.c_str());
  if (folder == nullptr) return false;
  bool empty = true;
  while (const dirent* entry = ::readdir(folder)) {
    empty &= std::strcmp(entry->d_name, ".") == 0 || std::strcmp(entry->d_name, "..") == 0;
  }
  ::closedir(folder);
  return empty;
}

/// Creates the folder and those above it. @throws FileError
inline void create_folders(const std::string& path) {
  for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    if (::mkdir(part.c_str(), 0777) != 0 && errno != EEXIST) throw FileError(errno, "write", part);
    if (end == std::string::npos) return;
  }
}

/// Removes the folder and its contents, as far as possible.
inline void remove_folder(const std::string& path) noexcept {
  const auto remove_one = [](const char* entry, const struct stat*, int, struct FTW*) {
    return std::remove(entry) == 0 ? 0 : -1;
  };
  ::nftw(path.c_str(), remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/// A short name for a temporary file or folder that no other thread or process uses.
inline std::string temporary_name() {
  static std::atomic<unsigned> sequence{0};
  char name[64];
  std::snprintf(name, sizeof name, ".headwise-%d-%u-%08x.part", static_cast<int>(::getpid()),
                sequence++, std::random_device()());
  return name;
}

/// The folder that contains `path`. Without std::filesystem: see the top of this file.
std::string folder_of(const std::string& path);

/// A rename is durable once its folder is; a folder that cannot be opened is not an error.
void sync_folder(const std::string& path) noexcept;

/// `path` with symbolic links resolved, whether or not it exists.
std::string through_links(std::string path);

}  // namespace headwise

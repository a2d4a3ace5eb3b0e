// Atomic file writes: files are written under a temporary name beside their target, then renamed.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "headwise/files.h"

namespace headwise {

/// A file that is being written. The data goes to a hidden file beside `path`; commit() makes it
/// durable and renames it into place, so that readers see the old file or the new one. Without
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
  /// @throws FileError; the file at `path` is then unchanged
  void commit();

 private:
  std::string path_;    ///< the target
  std::string beside_;  ///< the file until then; empty for a device
  int descriptor_ = -1;
};

/// Replaces the file at `path` by `content`, atomically.
/// @throws as AtomicFile
HEADWISE_API void write_atomic(const std::string& path, std::string_view content);

/// A new, empty folder beside `target` (beside what it names, if it is a symbolic link), in which
/// its replacement can be written.
/// @throws FileError
HEADWISE_API std::string folder_beside(const std::string& target);

/// Replaces the folder `target` by the folder `beside`, in one step if the file system can exchange
/// two folders (on Linux all the usual ones): readers see the old folder or the new one. Files that
/// only the old one has are kept. A symbolic link at `target` stays a link, and the folder it
/// points to is replaced. If several callers do this at once, the files of the last one stay.
/// @throws FileError; `target` is then unchanged, and `beside` still exists
HEADWISE_API void replace_folder(const std::string& beside, const std::string& target);

/// The text of a JSON file, in UTF-8, checked: no duplicate keys, no byte of value 0, nested at
/// most 32 deep.
/// @throws as read_file; c10::ValueError if it is not such JSON
HEADWISE_API std::string read_json(const std::string& path, size_t limit);

/// The bytes of a regular file.
/// @throws FileError if it cannot be read
/// @throws c10::ValueError if it is larger than `limit` bytes or not a regular file
HEADWISE_API std::string read_file(const std::string& path, size_t limit);

}  // namespace headwise

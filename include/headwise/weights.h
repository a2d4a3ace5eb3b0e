// Tensors in files: the safetensors format (a JSON header, then bytes), shared by C++ and Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "headwise/export.h"

namespace headwise {

using NamedTensors = std::map<std::string, at::Tensor>;
using Metadata = std::map<std::string, std::string>;

/// The contents of a safetensors file.
struct SafetensorsFile {
  NamedTensors tensors;  ///< on the CPU, contiguous
  Metadata metadata;     ///< the header's "__metadata__"
};

/// Writes `tensors` to `path` atomically (see files.h). Every dtype that safetensors and torch
/// share is kept: float64, float32, float16, bfloat16, the float8 types, bool, signed and unsigned
/// integers, complex64. Tensors on other devices are copied; views become contiguous.
/// @throws c10::TypeError  for a dtype or layout that the format has no name for
/// @throws c10::ValueError for an undefined or meta tensor, or a name that is "__metadata__", not
///                         UTF-8 or holds a NUL
/// @throws FileError       if it cannot be written
HEADWISE_API void save_safetensors(const std::string& path, const NamedTensors& tensors,
                                   const Metadata& metadata = {});

/// Reads all tensors of a safetensors file. The file is not trusted: nothing in it can make this
/// read outside the file or allocate more than the file's size (the header is limited to 100 MB, as
/// in the reference implementation).
/// @throws c10::ValueError if the file breaks a rule of the format, saying which tensor and rule
/// @throws FileError       if it cannot be read
HEADWISE_API SafetensorsFile load_safetensors(const std::string& path);

/// The metadata alone; the header is checked as in load_safetensors, the tensors are not read.
HEADWISE_API Metadata read_safetensors_metadata(const std::string& path);

}  // namespace headwise

#include "headwise/weights.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "descriptor.h"
#include "files.h"
#include "json.h"

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

namespace headwise {
namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the reference implementation
constexpr size_t kMaxDims = 64;               // what torch's operators handle

constexpr std::array<std::pair<const char*, at::ScalarType>, 20> kTypes{{
    {"F64", at::kDouble},
    {"F32", at::kFloat},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"F4", at::kFloat4_e2m1fn_x2},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E4M3FNUZ", at::kFloat8_e4m3fnuz},
    {"F8_E5M2FNUZ", at::kFloat8_e5m2fnuz},
    {"F8_E8M0", at::kFloat8_e8m0fnu},
    {"I64", at::kLong},
    {"I32", at::kInt},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U64", at::kUInt64},
    {"U32", at::kUInt32},
    {"U16", at::kUInt16},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
    {"C64", at::kComplexFloat},
}};

const char* type_name(at::ScalarType type) {
  for (const auto& [name, candidate] : kTypes) {
    if (candidate == type) return name;
  }
  return nullptr;
}

/// The header's entry of one tensor, checked.
struct Entry {
  std::string name;
  at::ScalarType type;
  std::vector<int64_t> shape;
  uint64_t begin;  // of the bytes, from the end of the header
  uint64_t end;
};

struct Header {
  std::vector<Entry> entries;  // by position in the file
  Metadata metadata;
  uint64_t data_begin = 0;
};

// A header may have any number of tensors, so its objects find keys in a tree.
using HeaderJson = nlohmann::json;

uint64_t as_size(const HeaderJson& value, const std::string& what) {
  TORCH_CHECK_VALUE(value.is_number_integer(), what, " must be integers, got ", shown_json(value));
  TORCH_CHECK_VALUE(value.is_number_unsigned(), what, " must not be negative, got ",
                    shown_json(value));
  const auto size = value.get<uint64_t>();
  TORCH_CHECK_VALUE(size <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()), what,
                    " must fit 63 bits, got ", shown_json(value));
  return size;
}

Entry parse_entry(const std::string& name, const HeaderJson& value, uint64_t data_size,
                  const std::string& file) {
  const std::string what = "tensor " + shown(name) + " of " + file;
  TORCH_CHECK_VALUE(name.find('\0') == std::string::npos, what,
                    " must not have a NUL character in its name");
  check_keys(value, {"dtype", "shape", "data_offsets"}, what);

  Entry entry{name, at::ScalarType::Undefined, {}, 0, 0};
  const std::string dtype = get_string(value, "dtype", what);
  for (const auto& [known, type] : kTypes) {
    if (dtype == known) entry.type = type;
  }
  TORCH_CHECK_VALUE(entry.type != at::ScalarType::Undefined, what, " has the dtype ", shown(dtype),
                    ", which torch does not have");

  const HeaderJson& shape = value["shape"];
  TORCH_CHECK_VALUE(shape.is_array(), "shape of ", what, " must be an array, got ",
                    shape.type_name());
  TORCH_CHECK_VALUE(shape.size() <= kMaxDims, "shape of ", what, " must have at most ", kMaxDims,
                    " dimensions, got ", shape.size());
  uint64_t elements = 1;  // with empty dimensions counted as 1, as strides are
  bool empty = false;
  bool overflow = false;
  for (const HeaderJson& dimension : shape) {
    const uint64_t size = as_size(dimension, "shape of " + what + ": dimensions");
    empty |= size == 0;
    overflow |= __builtin_mul_overflow(elements, std::max<uint64_t>(size, 1), &elements);
    entry.shape.push_back(static_cast<int64_t>(size));
  }
  uint64_t bytes = 0;
  // Two numbers of 4 bits share a byte, which is one element of torch's dtype.
  if (entry.type == at::kFloat4_e2m1fn_x2) {
    TORCH_CHECK_VALUE(!entry.shape.empty() && entry.shape.back() % 2 == 0, "shape of ", what,
                      " must end with an even size, being of dtype F4, got ",
                      at::IntArrayRef(entry.shape));
    entry.shape.back() /= 2;
    elements = std::max<uint64_t>(elements / 2, 1);
  }
  overflow |= __builtin_mul_overflow(elements, c10::elementSize(entry.type), &bytes);
  overflow |= bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  TORCH_CHECK_VALUE(!overflow, "shape of ", what, " must have fewer than 2^63 bytes, got ",
                    at::IntArrayRef(entry.shape));
  if (empty) bytes = 0;

  const HeaderJson& offsets = value["data_offsets"];
  TORCH_CHECK_VALUE(offsets.is_array() && offsets.size() == 2, "data_offsets of ", what,
                    " must be two integers, got ",
                    offsets.is_array() ? std::to_string(offsets.size()) + " elements"
                                       : std::string(offsets.type_name()));
  entry.begin = as_size(offsets[0], "data_offsets of " + what);
  entry.end = as_size(offsets[1], "data_offsets of " + what);
  TORCH_CHECK_VALUE(entry.begin <= entry.end, "data_offsets of ", what, " must ascend, got [",
                    entry.begin, ", ", entry.end, "]");
  TORCH_CHECK_VALUE(entry.end <= data_size, "data_offsets of ", what, " must end within the ",
                    data_size, " bytes of data, got [", entry.begin, ", ", entry.end, "]");
  TORCH_CHECK_VALUE(entry.end - entry.begin == bytes, "data_offsets of ", what, " must span the ",
                    bytes, " bytes of its shape and dtype, got ", entry.end - entry.begin);
  return entry;
}

Metadata parse_metadata(const HeaderJson& value, const std::string& file) {
  if (value.is_null()) return {};
  TORCH_CHECK_VALUE(value.is_object(), "__metadata__ of ", file, " must be a JSON object, got ",
                    value.type_name());
  Metadata metadata;
  for (const auto& [key, text] : value.items()) {
    TORCH_CHECK_VALUE(text.is_string(), "__metadata__ of ", file, " must hold strings, got ",
                      text.type_name(), " at ", shown(key));
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

/// Tensors must fill the data one after another: an overlap would let one name change another's
/// values, a hole could carry something that no name shows.
void check_layout(const std::vector<Entry>& entries, uint64_t data_size, const std::string& file) {
  uint64_t position = 0;
  for (const Entry& entry : entries) {
    TORCH_CHECK_VALUE(entry.begin >= position, "tensor ", shown(entry.name), " of ", file,
                      " must not overlap the one before it: it begins at ", entry.begin,
                      ", that ends at ", position);
    TORCH_CHECK_VALUE(entry.begin == position, "tensor ", shown(entry.name), " of ", file,
                      " must begin where the one before it ends (", position, "), got ",
                      entry.begin);
    position = entry.end;
  }
  TORCH_CHECK_VALUE(position == data_size, file, " must end with its last tensor (", position,
                    " bytes of data), got ", data_size);
}

Header read_header(const InputFile& input, const std::string& file) {
  TORCH_CHECK_VALUE(input.size() >= 8, file,
                    " is truncated: a safetensors file begins with 8 bytes ",
                    "of header length, got ", input.size());
  uint64_t length = 0;
  input.read(0, &length, sizeof length);
  TORCH_CHECK_VALUE(length <= kMaxHeader, file, " must have a header of at most ", kMaxHeader,
                    " bytes, got a header length of ", length);
  TORCH_CHECK_VALUE(length <= input.size() - 8, file, " is truncated: its header of ", length,
                    " bytes ends past the end of the file (", input.size(), " bytes)");
  std::string text(length, '\0');
  input.read(8, text.data(), text.size());
  const auto document = parse_json<HeaderJson>(text, "the header of " + file, /*max_depth=*/3);
  TORCH_CHECK_VALUE(document.is_object(), "the header of ", file, " must be a JSON object, got ",
                    document.type_name());
  Header header;
  header.data_begin = 8 + length;
  const uint64_t data_size = input.size() - header.data_begin;
  for (const auto& [name, value] : document.items()) {
    if (name == "__metadata__") {
      header.metadata = parse_metadata(value, file);
    } else {
      header.entries.push_back(parse_entry(name, value, data_size, file));
    }
  }
  std::sort(header.entries.begin(), header.entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_layout(header.entries, data_size, file);
  return header;
}

/// `tensor` as the bytes of a file: on the CPU, contiguous.
at::Tensor as_bytes(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), "tensor ", shown(name), " must be defined");
  TORCH_CHECK_VALUE(!tensor.is_meta(), "tensor ", shown(name),
                    " must have data, got a meta tensor");
  TORCH_CHECK_TYPE(!tensor.unsafeGetTensorImpl()->is_python_dispatch(), "tensor ", shown(name),
                   " must hold its own data, got a subclass of Tensor that wraps others (such "
                   "as DTensor)");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), "tensor ", shown(name),
                   " must be dense, got layout ", tensor.layout());
  TORCH_CHECK_TYPE(type_name(tensor.scalar_type()) != nullptr, "tensor ", shown(name),
                   " must have a dtype that safetensors has, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.scalar_type() != at::kFloat4_e2m1fn_x2 || tensor.dim() > 0, "tensor ",
                    shown(name), " must have a dimension, being of dtype F4");
  return tensor.detach().resolve_conj().resolve_neg().to(at::kCPU).contiguous();
}

}  // namespace

void save_safetensors(const std::string& path, const NamedTensors& tensors,
                      const Metadata& metadata) {
  std::vector<std::pair<std::string, at::Tensor>> ordered;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(name != "__metadata__",
                      "a tensor must not be named \"__metadata__\", which the format reserves");
    TORCH_CHECK_VALUE(name.find('\0') == std::string::npos, "tensor ", shown(name),
                      " must not have a NUL character in its name");
    ordered.emplace_back(name, as_bytes(name, tensor));
  }
  // Wide elements first, so that every tensor is aligned for readers that map the file.
  std::stable_sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
    return a.second.element_size() > b.second.element_size();
  });

  // Added without a lookup, which would search all the names before it.
  Json::object_t header;
  if (!metadata.empty()) header.emplace_back("__metadata__", metadata);
  uint64_t position = 0;
  for (const auto& [name, tensor] : ordered) {
    const uint64_t end = position + tensor.nbytes();
    auto shape = tensor.sizes().vec();
    if (tensor.scalar_type() == at::kFloat4_e2m1fn_x2) shape.back() *= 2;
    header.emplace_back(name, Json{{"dtype", type_name(tensor.scalar_type())},
                                   {"shape", std::move(shape)},
                                   {"data_offsets", {position, end}}});
    position = end;
  }
  std::string text;
  try {
    text = Json(std::move(header)).dump();
  } catch (const Json::exception&) {
    TORCH_CHECK_VALUE(false, "names of tensors and metadata must be UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  TORCH_CHECK_VALUE(text.size() <= kMaxHeader, "tensors must have a header of at most ", kMaxHeader,
                    " bytes, got ", text.size());

  AtomicFile file(path);
  const uint64_t length = text.size();
  file.write(&length, sizeof length);
  file.write(text.data(), text.size());
  for (const auto& [name, tensor] : ordered) file.write(tensor.const_data_ptr(), tensor.nbytes());
  file.commit();
}

SafetensorsFile load_safetensors(const std::string& path) {
  const std::string file = shown_path(path);
  const InputFile input(path);
  Header header = read_header(input, file);
  SafetensorsFile result;
  result.metadata = std::move(header.metadata);
  for (const Entry& entry : header.entries) {
    at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.type));
    const size_t bytes = entry.end - entry.begin;
    input.read(header.data_begin + entry.begin, tensor.data_ptr(), bytes);
    if (entry.type == at::kBool) {
      // A bool that is neither 0 nor 1 is undefined behaviour in every kernel that reads it.
      const auto* flags = static_cast<const uint8_t*>(tensor.const_data_ptr());
      TORCH_CHECK_VALUE(std::all_of(flags, flags + bytes, [](uint8_t flag) { return flag <= 1; }),
                        "tensor ", shown(entry.name), " of ", file,
                        " must have only 0 and 1, being of dtype BOOL");
    }
    result.tensors.emplace(entry.name, std::move(tensor));
  }
  return result;
}

Metadata read_safetensors_metadata(const std::string& path) {
  return read_header(InputFile(path), shown_path(path)).metadata;
}

}  // namespace headwise

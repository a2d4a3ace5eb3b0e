// headwise._C: safetensors files and atomic writing. FileError arrives as OSError.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/extension.h>

#include <filesystem>

#include "files.h"
#include "headwise/weights.h"

namespace py = pybind11;

namespace {

// OSError(errno, text, path) becomes FileNotFoundError, PermissionError, ... by its errno.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const headwise::FileError& error) {
    const int number = error.code().value();
    const py::tuple arguments =
        py::make_tuple(number, std::generic_category().message(number), error.path());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

void bind_weights(py::module_& m) {
  using Path = std::filesystem::path;
  py::register_local_exception_translator(translate);
  m.def(
      "write_atomic",
      [](const Path& path, const py::bytes& content) {
        const std::string_view view = content;
        const py::gil_scoped_release unlocked;
        headwise::write_atomic(path.string(), view);
      },
      py::arg("path"), py::arg("content"));
  m.def("folder_beside",
        [](const Path& target) { return Path(headwise::folder_beside(target.string())); });
  m.def("replace_folder", [](const Path& beside, const Path& target) {
    const std::string from = beside.string(), to = target.string();
    const py::gil_scoped_release unlocked;
    headwise::replace_folder(from, to);
  });
  m.def("read_json", [](const Path& path, size_t limit) {
    return py::bytes(headwise::read_json(path.string(), limit));
  });
  m.def(
      "save_safetensors",
      [](const Path& path, const headwise::NamedTensors& tensors,
         const headwise::Metadata& metadata) {
        const py::gil_scoped_release unlocked;
        headwise::save_safetensors(path.string(), tensors, metadata);
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata"));
  m.def(
      "load_safetensors",
      [](const Path& path) {
        const py::gil_scoped_release unlocked;
        return headwise::load_safetensors(path.string()).tensors;
      },
      py::arg("path"));
  m.def(
      "read_safetensors_metadata",
      [](const Path& path) { return headwise::read_safetensors_metadata(path.string()); },
      py::arg("path"));
}

// JSON text of the C++ core as Python objects, and back.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

inline std::string to_json_text(const pybind11::object& value) {
  if (value.is_none()) return "{}";
  const auto dumps = pybind11::module_::import("json").attr("dumps");
  return dumps(value, pybind11::arg("allow_nan") = false).cast<std::string>();
}

inline pybind11::object from_json_text(const std::string& text) {
  return pybind11::module_::import("json").attr("loads")(text);
}

/// A text of Python as UTF-8; half surrogate pairs, which have none, as escapes.
inline std::string text_of(const pybind11::handle& value) {
  const auto text = pybind11::reinterpret_steal<pybind11::bytes>(
      PyUnicode_AsEncodedString(value.ptr(), "utf-8", "backslashreplace"));
  if (!text) throw pybind11::error_already_set();
  return text;
}

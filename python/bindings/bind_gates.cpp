#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "gates/options.h"
#include "json_objects.h"
#include "recomputation.h"

namespace {

namespace py = pybind11;
using Json = nlohmann::ordered_json;

// What an option's value is as JSON: anything but a number, flag, text or sequence becomes a text,
// which the option's check then refuses.
Json json_of(const py::handle& value, int depth = 0) {
  PyObject* object = value.ptr();
  if (value.is_none()) return nullptr;
  if (PyBool_Check(object)) return object == Py_True;
  if (PyLong_Check(object)) {
    int overflow = 0;
    const auto number = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow == 0) return static_cast<int64_t>(number);
    const double wide = PyLong_AsDouble(object);
    if (PyErr_Occurred() == nullptr) return wide;
    PyErr_Clear();
    return overflow * std::numeric_limits<double>::infinity();
  }
  if (PyFloat_Check(object)) return PyFloat_AsDouble(object);
  if (PyUnicode_Check(object)) return text_of(value);
  if (depth < 4 * headwise::kMostNested) {
    if (PyDict_Check(object)) {
      Json members = Json::object();
      for (const auto& [key, member] : py::reinterpret_borrow<py::dict>(value)) {
        members[text_of(py::str(key))] = json_of(member, depth + 1);
      }
      return members;
    }
    if (py::hasattr(value, "tolist")) return json_of(value.attr("tolist")(), depth + 1);
    if (!PyBytes_Check(object) && py::hasattr(value, "__iter__")) {
      Json items = Json::array();
      for (const auto& item : value) {
        items.push_back(json_of(item, depth + 1));
        if (items.size() > static_cast<size_t>(headwise::kMostHeads)) break;
      }
      return items;
    }
    if (py::hasattr(value, "__float__"))
      return py::float_(value.attr("__float__")()).cast<double>();
  }
  return text_of(py::repr(value));
}

}  // namespace

void bind_gates(py::module_& m) {
  m.def("recomputing", &headwise::recomputing,
        "Whether this thread is inside a backward: a forward there repeats an earlier one.");
  m.def("may_be_recomputed", &headwise::may_be_recomputed,
        "Whether saved-tensor hooks are set or gradients are off, as in activation checkpointing.");

  py::class_<headwise::OptionRow>(m, "OptionRow", "One option of a gate.")
      .def_readonly("name", &headwise::OptionRow::name)
      .def_readonly("type", &headwise::OptionRow::type, "as in Python: 'float', 'int | None', ...")
      .def_property_readonly(
          "default",
          [](const headwise::OptionRow& row) { return from_json_text(row.initial.dump()); })
      .def_readonly("rule", &headwise::OptionRow::rule,
                    "'in (0, 1]', for example; empty if the type is the only rule")
      .def_readonly("doc", &headwise::OptionRow::doc);
  m.def("gate_tables", &headwise::gate_tables, "[(name of a gate, its options)], for every gate.");
  m.def(
      "gate_options",
      [](const std::string& type, const py::dict& options) {
        auto object = json_of(options);
        object["type"] = type;
        const auto checked = headwise::gate_options_from_object(object);
        auto whole = headwise::gate_options_to_object(checked);
        whole.erase("type");
        return from_json_text(whole.dump());
      },
      py::arg("type"), py::arg("options"),
      "All options of a gate, those that are not given with their defaults.");
}

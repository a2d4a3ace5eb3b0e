#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "headwise/backends.h"

void bind_backends(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<headwise::Backend>(m, "Backend", "One way to execute a selection.")
      .def_readonly("name", &headwise::Backend::name)
      .def_readonly("device", &headwise::Backend::device, "'cuda' or 'cpu'")
      .def_readonly("available", &headwise::Backend::available,
                    "whether it runs on this machine, with this build")
      .def_readonly("reason", &headwise::Backend::reason,
                    "why it cannot run, or what is known of it")
      .def("__repr__", [](const headwise::Backend& b) {
        return "Backend(name='" + b.name + "', device='" + b.device +
               "', available=" + (b.available ? "True" : "False") + ", reason='" + b.reason + "')";
      });
  m.def("backends", &headwise::backends,
        "Every backend of the attention operators, for each device the fastest first: the order in "
        "which they are tried, each with the reason why it cannot run, or what is known of it.");
}

// headwise._C: moments and repair, under headwise.pruning.
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/repair.h"

namespace py = pybind11;
using headwise::OutputMoments;
using headwise::OutputProjection;
using headwise::RemovalOrder;
using headwise::Repaired;

namespace {

using Bias = std::optional<at::Tensor>;

}  // namespace

void bind_repair(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<OutputMoments>(m, "OutputMoments")
      .def(py::init<int64_t, int64_t>(), py::arg("inputs"), py::arg("outputs"))
      .def("add", &OutputMoments::add, py::arg("inputs"), py::arg("targets"), released)
      .def("merge", &OutputMoments::merge, py::arg("other"))
      .def("select", &OutputMoments::select, py::arg("columns"))
      .def_property_readonly("inputs", &OutputMoments::inputs)
      .def_property_readonly("outputs", &OutputMoments::outputs)
      .def_property_readonly("tokens", &OutputMoments::tokens)
      .def(
          "solve",
          [](const OutputMoments& self, const at::Tensor& weight, const Bias& bias, double ridge) {
            const OutputProjection found = self.solve({weight, bias}, ridge);
            return std::pair(found.weight, found.bias);
          },
          py::arg("weight"), py::arg("bias"), py::arg("ridge"), released)
      .def(
          "error",
          [](const OutputMoments& self, const at::Tensor& weight, const Bias& bias) {
            return self.error({weight, bias});
          },
          py::arg("weight"), py::arg("bias") = std::nullopt, released)
      .def("variance", &OutputMoments::variance);
  py::class_<Repaired>(m, "Repaired")
      .def_property_readonly("weight", [](const Repaired& r) { return r.projection.weight; })
      .def_property_readonly("bias", [](const Repaired& r) { return r.projection.bias; })
      .def_readonly("ridge", &Repaired::ridge)
      .def_readonly("error_before", &Repaired::error_before)
      .def_readonly("error_after", &Repaired::error_after)
      .def_readonly("variance", &Repaired::variance);
  m.def(
      "repair_projection",
      [](const OutputMoments& fit, const OutputMoments& held_out, const at::Tensor& weight,
         const Bias& bias, const std::vector<double>& ridges) {
        return headwise::repair_projection(fit, held_out, {weight, bias}, ridges);
      },
      py::arg("fit"), py::arg("held_out"), py::arg("weight"), py::arg("bias"), py::arg("ridges"),
      released);
  py::class_<RemovalOrder>(m, "RemovalOrder")
      .def_readonly("units", &RemovalOrder::units)
      .def_readonly("error", &RemovalOrder::error);
  m.def("removal_order", &headwise::removal_order, py::arg("moments"), py::arg("weight"),
        py::arg("group"), py::arg("ridge"), released);
}

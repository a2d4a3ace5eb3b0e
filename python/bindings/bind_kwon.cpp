// headwise._C: the searches of Kwon et al. 2022, under headwise.pruning.structured.
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/kwon.h"

namespace py = pybind11;
using headwise::FisherAccumulator;
using headwise::KeptUnits;
using headwise::LatencyFit;
using headwise::ScaleSolver;

void bind_kwon(py::module_& m) {
  py::class_<FisherAccumulator>(m, "FisherAccumulator")
      .def(py::init<>())
      .def("add", &FisherAccumulator::add, py::arg("layer"), py::arg("gradient"))
      .def("gradients", &FisherAccumulator::gradients, py::arg("layer"))
      .def("scores", &FisherAccumulator::scores, py::arg("layer"));
  py::class_<KeptUnits>(m, "KeptUnits")
      .def_readonly("heads", &KeptUnits::heads)
      .def_readonly("neurons", &KeptUnits::neurons)
      .def_readonly("score", &KeptUnits::score)
      .def_readonly("cost", &KeptUnits::cost);
  py::class_<LatencyFit>(
      m, "LatencyFit",
      "Time of a layer: `base` seconds up to `threshold` units, `slope` more for "
      "each beyond.")
      .def(py::init([](double base, int64_t threshold, double slope) {
             return LatencyFit{base, threshold, slope};
           }),
           py::arg("base"), py::arg("threshold"), py::arg("slope"))
      .def_readonly("base", &LatencyFit::base)
      .def_readonly("threshold", &LatencyFit::threshold)
      .def_readonly("slope", &LatencyFit::slope)
      .def("seconds", &LatencyFit::seconds, py::arg("units"))
      .def("__repr__", [](const LatencyFit& fit) {
        return py::str("LatencyFit(base={}, threshold={}, slope={})")
            .format(fit.base, fit.threshold, fit.slope);
      });
  py::class_<ScaleSolver>(m, "ScaleSolver")
      .def(py::init<const at::Tensor&, int64_t>(), py::arg("weight"), py::arg("group"))
      .def("add", &ScaleSolver::add, py::arg("inputs"), py::arg("residual"))
      .def("solve", &ScaleSolver::solve, py::arg("damp"))
      .def("solve_released", &ScaleSolver::solve_released, py::arg("intercept"))
      .def("error", &ScaleSolver::error, py::arg("scale"));
  m.def("search_macs", &headwise::search_macs, py::arg("heads"), py::arg("neurons"),
        py::arg("head_cost"), py::arg("neuron_cost"), py::arg("limit"));
  m.def("fit_latency", &headwise::fit_latency, py::arg("units"), py::arg("seconds"));
  m.def("search_latency", &headwise::search_latency, py::arg("heads"), py::arg("neurons"),
        py::arg("head_time"), py::arg("neuron_time"), py::arg("limit"));
  m.def("rearrange", &headwise::rearrange, py::arg("gradients"), py::arg("kept"));
}

// headwise._C: the steps of searches that Python drives: pruning paths and calibrations.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/calibration.h"
#include "headwise/scoring.h"

namespace py = pybind11;
using headwise::Trial;

void bind_searches(py::module_& m) {
  m.def("pruning_counts", &headwise::pruning_counts, py::arg("total"), py::arg("keep"),
        py::arg("step"));
  m.def("narrowed", &headwise::narrowed, py::arg("before"), py::arg("scores"), py::arg("count"),
        py::arg("min_heads_per_layer") = 0);
  // Trials are (argument, value).
  m.def(
      "nearest_by_halving",
      [](const std::function<double(double)>& value, double target, double low, double high,
         int64_t passes, const std::pair<double, double>& start) {
        const Trial found = headwise::nearest_by_halving(value, target, low, high, passes,
                                                         Trial{start.first, start.second});
        return std::pair(found.argument, found.value);
      },
      py::arg("value"), py::arg("target"), py::arg("low"), py::arg("high"), py::arg("passes"),
      py::arg("start"));
  m.def(
      "check_calibrated",
      [](const std::pair<double, double>& nearest, double keep, double tolerance) {
        headwise::check_calibrated(Trial{nearest.first, nearest.second}, keep, tolerance);
      },
      py::arg("nearest"), py::arg("keep"), py::arg("tolerance"));
}

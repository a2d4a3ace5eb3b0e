// headwise._C: HeadScores, HeadScoreAccumulator and hies, under headwise.pruning.
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/importance.h"

namespace py = pybind11;
using headwise::AbsoluteValue;
using headwise::HeadScoreAccumulator;
using headwise::HeadScores;
using headwise::Scope;

namespace {

AbsoluteValue absolute_value(const std::string& name) {
  if (name == "per_token") return AbsoluteValue::per_token;
  if (name == "per_example") return AbsoluteValue::per_example;
  if (name == "per_batch") return AbsoluteValue::per_batch;
  throw py::value_error("absolute must be 'per_token', 'per_example' or 'per_batch', got '" + name +
                        "'");
}

Scope scope_of(const std::string& name) {
  if (name == "layer") return Scope::layer;
  if (name == "global") return Scope::global;
  throw py::value_error("scope must be 'layer' or 'global', got '" + name + "'");
}

}  // namespace

void bind_importance(py::module_& m) {
  py::class_<HeadScores>(m, "HeadScores")
      .def(py::init([](std::string metric, std::vector<std::string> layers,
                       std::vector<std::vector<double>> values) {
             TORCH_CHECK_VALUE(layers.size() == values.size(),
                               "layers and values must be as many, got ", layers.size(), " and ",
                               values.size());
             return HeadScores{std::move(metric), std::move(layers), std::move(values)};
           }),
           py::arg("metric"), py::arg("layers"), py::arg("values"))
      .def_readonly("metric", &HeadScores::metric)
      .def_readonly("layers", &HeadScores::layers)
      .def_readonly("values", &HeadScores::values)
      .def("to_json", &HeadScores::to_json)
      .def_static("from_json", &HeadScores::from_json, py::arg("text"));

  py::class_<HeadScoreAccumulator>(m, "HeadScoreAccumulator")
      .def(py::init<>())
      .def("add_gradient", &HeadScoreAccumulator::add_gradient, py::arg("layer"),
           py::arg("context"), py::arg("gradient"), py::arg("query_padding_mask") = py::none(),
           py::call_guard<py::gil_scoped_release>())
      .def("add_statistics", &HeadScoreAccumulator::add_statistics, py::arg("layer"),
           py::arg("entropy"), py::arg("confidence"), py::call_guard<py::gil_scoped_release>())
      .def("merge", &HeadScoreAccumulator::merge, py::arg("other"))
      .def(
          "michel",
          [](const HeadScoreAccumulator& self, const std::string& absolute, bool normalize) {
            return self.michel(absolute_value(absolute), normalize);
          },
          py::arg("absolute") = "per_token", py::arg("normalize") = true)
      .def("entropy", &HeadScoreAccumulator::entropy)
      .def("confidence", &HeadScoreAccumulator::confidence);

  m.def(
      "hies",
      [](const HeadScores& importance, const HeadScores& entropy, double alpha,
         const std::string& scope) {
        return headwise::hies(importance, entropy, alpha, scope_of(scope));
      },
      py::arg("importance"), py::arg("entropy"), py::arg("alpha") = 0.5,
      py::arg("scope") = "global");
}

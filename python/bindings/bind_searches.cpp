// headwise._C: the steps of searches that Python drives: pruning paths, calibrations and confidence
// policies.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "calibration.h"
#include "headwise/confidence.h"
#include "headwise/scoring.h"
#include "scoring.h"

namespace py = pybind11;
using headwise::Trial;

namespace {

using headwise::ConfidenceStages;
using headwise::FittedPolicy;
using headwise::StagedPrediction;
using headwise::StageFunction;

void bind_confidence(py::module_& m) {
  py::class_<StagedPrediction>(m, "StagedPrediction",
                               "What a ConfidencePolicy predicted for a batch, and why.")
      .def_readonly("logits", &StagedPrediction::logits,
                    "floating [B, C], of the stage at which each input stopped")
      .def_readonly("stage", &StagedPrediction::stage, "int64 [B], that stage")
      .def_readonly("confidence", &StagedPrediction::confidence,
                    "float32 [S, B], after every stage; NaN if the input stopped before")
      .def_readonly("heads", &StagedPrediction::heads,
                    "int64 [S, B], heads of all layers that each stage ran; 0 if it did not")
      .def_readonly("threshold", &StagedPrediction::threshold, "the required confidence")
      .def_property_readonly("total_heads", &StagedPrediction::total_heads,
                             "int64 [B]: heads that each input ran, all stages together")
      .def("reason", &StagedPrediction::reason, py::arg("row"),
           "Why input `row` ran this number of heads, in words.");
  py::class_<FittedPolicy>(m, "FittedPolicy",
                           "The result of ConfidencePolicy.fit_accuracy, on the given data.")
      .def_readonly("threshold", &FittedPolicy::threshold, "now set in the policy")
      .def_readonly("heads", &FittedPolicy::heads, "mean heads of an input, all stages together")
      .def_readonly("accuracy", &FittedPolicy::accuracy, "of the policy")
      .def_readonly("widest_heads", &FittedPolicy::widest_heads,
                    "mean heads of the widest stage alone")
      .def_readonly("widest_accuracy", &FittedPolicy::widest_accuracy, "of the widest stage alone")
      .def_property_readonly("pays", &FittedPolicy::pays,
                             "Whether the policy runs fewer heads than the widest stage alone.")
      .def("__repr__", [](const FittedPolicy& fitted) {
        return py::str(
                   "FittedPolicy(threshold={}, heads={}, accuracy={}, widest_heads={}, "
                   "widest_accuracy={})")
            .format(fitted.threshold, fitted.heads, fitted.accuracy, fitted.widest_heads,
                    fitted.widest_accuracy);
      });
  // Stage functions are given rows int64 [N] or None, and a factor.
  py::class_<ConfidenceStages>(m, "ConfidenceStages")
      .def(py::init<std::vector<double>, double, std::string>(), py::arg("factors"),
           py::arg("threshold"), py::arg("measure"))
      .def("predict", &ConfidenceStages::predict, py::arg("run"))
      .def("fit", &ConfidenceStages::fit, py::arg("runs"), py::arg("heads"))
      .def(
          "fit_accuracy",
          [](ConfidenceStages& self, const std::vector<StageFunction>& runs,
             const std::vector<std::optional<at::Tensor>>& labels, double loss,
             std::optional<double> certainty) {
            std::vector<at::Tensor> own;
            for (const auto& each : labels) own.push_back(each.value_or(at::Tensor()));
            return self.fit_accuracy(runs, own, loss, certainty);
          },
          py::arg("runs"), py::arg("labels"), py::arg("loss"), py::arg("certainty"))
      .def_property("threshold", &ConfidenceStages::threshold, &ConfidenceStages::set_threshold)
      .def_property_readonly("factors", &ConfidenceStages::factors)
      .def_property_readonly("measure", &ConfidenceStages::measure);
}

}  // namespace

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
      "find_threshold",
      [](const std::function<std::tuple<int64_t, int64_t, double>(double)>& run, double keep,
         int64_t passes, double tolerance) {
        const auto use = [&](double threshold) {
          const auto [heads_run, heads, highest] = run(threshold);
          return headwise::GateUse{heads_run, heads, highest};
        };
        return headwise::find_threshold(use, keep, passes, tolerance);
      },
      py::arg("run"), py::arg("keep"), py::arg("passes"), py::arg("tolerance"));
  bind_confidence(m);
}

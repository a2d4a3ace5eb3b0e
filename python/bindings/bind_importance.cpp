// headwise._C: HeadScores, HeadScorer and hies, under headwise.pruning.
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/importance.h"
#include "headwise/scoring.h"
#include "scope.h"

namespace py = pybind11;
using headwise::AbsoluteValue;
using headwise::HeadScorer;
using headwise::HeadScores;

namespace {

AbsoluteValue absolute_value(const std::string& name) {
  if (name == "per_token") return AbsoluteValue::per_token;
  if (name == "per_example") return AbsoluteValue::per_example;
  if (name == "per_batch") return AbsoluteValue::per_batch;
  throw py::value_error("absolute must be 'per_token', 'per_example' or 'per_batch', got '" + name +
                        "'");
}

}  // namespace

void bind_importance(py::module_& m) {
  py::class_<HeadScores>(m, "HeadScores")
      .def(py::init([](std::string metric, std::vector<std::string> layers,
                       std::vector<std::vector<double>> values) {
             TORCH_CHECK_VALUE(layers.size() == values.size(),
                               "layers and values must have the same length, got ", layers.size(),
                               " and ", values.size());
             return HeadScores{std::move(metric), std::move(layers), std::move(values)};
           }),
           py::arg("metric"), py::arg("layers"), py::arg("values"))
      .def_readonly("metric", &HeadScores::metric)
      .def_readonly("layers", &HeadScores::layers)
      .def_readonly("values", &HeadScores::values)
      .def("to_json", &HeadScores::to_json)
      .def_static("from_json", &HeadScores::from_json, py::arg("text"));

  // The caller sets layers' probes and runs the model.
  py::class_<HeadScorer>(m, "HeadScorer")
      .def(py::init([](std::vector<std::string> metrics, const std::string& absolute,
                       bool normalize, double alpha, const std::string& scope) {
             const auto options = headwise::ScoreOptions()
                                      .absolute(absolute_value(absolute))
                                      .normalize(normalize)
                                      .alpha(alpha)
                                      .scope(scope_of(scope));
             return HeadScorer(std::move(metrics), options);
           }),
           py::arg("metrics"), py::arg("absolute") = "per_token", py::arg("normalize") = true,
           py::arg("alpha") = 0.5, py::arg("scope") = "model")
      .def_property_readonly("needs_gradients", &HeadScorer::needs_gradients)
      .def(
          "see",
          [](HeadScorer& self, const std::string& layer, const at::Tensor& q, const at::Tensor& k,
             const at::Tensor& context, const std::optional<at::Tensor>& key_padding_mask,
             const std::optional<at::Tensor>& attn_mask, bool is_causal,
             const std::optional<at::Tensor>& query_padding_mask, int64_t added_keys) {
            headwise::AttentionProbe probe;
            probe.q = q;
            probe.k = k;
            probe.context = context;
            probe.arguments.key_padding_mask = key_padding_mask;
            probe.arguments.attn_mask = attn_mask;
            probe.arguments.is_causal = is_causal;
            probe.query_padding_mask = query_padding_mask;
            probe.added_keys = added_keys;
            self.see(layer, probe);
          },
          py::arg("layer"), py::arg("q"), py::arg("k"), py::arg("context"),
          py::arg("key_padding_mask"), py::arg("attn_mask"), py::arg("is_causal"),
          py::arg("query_padding_mask"), py::arg("added_keys"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "add",
          [](HeadScorer& self, const std::optional<at::Tensor>& loss) {
            self.add(loss.value_or(at::Tensor()));
          },
          py::arg("loss"), py::call_guard<py::gil_scoped_release>())
      .def("scores", &HeadScorer::scores);

  m.def(
      "hies",
      [](const HeadScores& importance, const HeadScores& entropy, double alpha,
         const std::string& scope) {
        return headwise::hies(importance, entropy, alpha, scope_of(scope));
      },
      py::arg("importance"), py::arg("entropy"), py::arg("alpha") = 0.5,
      py::arg("scope") = "model");
}

// headwise._C: plans and the pruning of weights, under headwise.pruning.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/extension.h>

#include <filesystem>

#include "headwise/pruning.h"
#include "json_objects.h"
#include "scope.h"

namespace py = pybind11;
using headwise::HeadPlan;
using headwise::LayerPlan;

namespace {

constexpr const char* kHeadPlanDoc =
    R"(Which heads of a model stay, layer by layer, with a scale each.

Args:
    layers: a LayerPlan for each layer; layers may keep different numbers of heads, down to none.
    metric: what the plan was made from.
    metadata: anything that JSON can hold, kept with the plan.

Raises:
    ValueError: heads that are not ascending, different and in range, a scale that is missing or not
        finite, a layer that occurs twice.
)";

LayerPlan make_layer(const std::string& name, int64_t num_heads, std::vector<int64_t> heads,
                     const std::optional<std::vector<double>>& scale) {
  auto scales = scale.value_or(std::vector<double>(heads.size(), 1.0));
  return {name, num_heads, std::move(heads), std::move(scales)};
}

}  // namespace

void bind_pruning(py::module_& m) {
  py::class_<LayerPlan>(m, "LayerPlan", "The heads of one layer that stay, and their scales.")
      .def(py::init(&make_layer), py::arg("name"), py::arg("num_heads"), py::arg("heads"),
           py::arg("scale") = py::none())
      .def_readonly("name", &LayerPlan::name)
      .def_readonly("num_heads", &LayerPlan::num_heads, "Heads of the layer, before.")
      .def_readonly("heads", &LayerPlan::heads, "Those that stay, ascending.")
      .def_readonly("scale", &LayerPlan::scale, "What multiplies each one's output.")
      .def("__eq__", &LayerPlan::operator==, py::is_operator())
      .def("__repr__", [](const LayerPlan& layer) {
        return py::str("LayerPlan(name={!r}, num_heads={}, heads={}, scale={})")
            .format(layer.name, layer.num_heads, layer.heads, layer.scale);
      });

  py::class_<HeadPlan>(m, "HeadPlan", kHeadPlanDoc)
      .def(py::init([](std::vector<LayerPlan> layers, const std::string& metric,
                       const py::object& metadata) {
             return HeadPlan(std::move(layers), metric, to_json_text(metadata));
           }),
           py::arg("layers"), py::arg("metric") = "", py::arg("metadata") = py::none())
      .def_property_readonly("layers", &HeadPlan::layers)
      .def_property_readonly("metric", &HeadPlan::metric)
      .def_property_readonly("metadata",
                             [](const HeadPlan& p) { return from_json_text(p.metadata()); })
      .def_property_readonly("num_heads", &HeadPlan::num_heads, "Heads of all layers, before.")
      .def_property_readonly("heads_kept", &HeadPlan::heads_kept, "Heads of all layers that stay.")
      .def("to_json", &HeadPlan::to_json, py::arg("indent") = 1)
      .def_static(
          "from_json", [](const py::str& text) { return HeadPlan::from_json(text_of(text)); },
          py::arg("text"), "Raises ValueError naming the key that is unknown, missing or wrong.")
      .def(
          "save",
          [](const HeadPlan& p, const std::filesystem::path& path) { p.save(path.string()); },
          py::arg("path"), "Writes the JSON to a file, atomically.")
      .def_static(
          "load", [](const std::filesystem::path& path) { return HeadPlan::load(path.string()); },
          py::arg("path"))
      .def("__eq__", &HeadPlan::operator==, py::is_operator())
      .def(py::pickle([](const HeadPlan& p) { return p.to_json(); },
                      [](const std::string& text) { return HeadPlan::from_json(text); }))
      .def("__deepcopy__", [](const HeadPlan& p, const py::dict&) { return p; })
      .def("__repr__", [](const HeadPlan& p) {
        return py::str("HeadPlan(metric={!r}, layers={}, heads={} of {})")
            .format(p.metric(), p.layers().size(), p.heads_kept(), p.num_heads());
      });

  m.def(
      "plan",
      [](const headwise::HeadScores& scores, double keep, int64_t min_heads_per_layer,
         const std::string& scope) {
        return headwise::plan(scores, keep, min_heads_per_layer, scope_of(scope));
      },
      py::arg("scores"), py::arg("keep"), py::arg("min_heads_per_layer"), py::arg("scope"));
  m.def("prune_projections", &headwise::prune_projections, py::arg("parameters"), py::arg("layer"));
}

// headwise._C: structure plans and the compaction of weights, under headwise.pruning.structured.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/extension.h>

#include <filesystem>

#include "headwise/structure.h"
#include "json_objects.h"
#include "structure/units.h"

namespace py = pybind11;
using headwise::BlockPlan;
using headwise::FfnPlan;
using headwise::HeadPlan;
using headwise::HiddenPlan;
using headwise::StructurePlan;

namespace {

constexpr const char* kStructurePlanDoc =
    R"(What of a transformer stays: a HeadPlan, and neurons, blocks and hidden dimensions.

What the plan does not name stays as it is.

Args:
    heads: the heads that stay (HeadPlan).
    ffn: an FfnPlan for each feed-forward network with fewer neurons.
    blocks: a BlockPlan for each attention or feed-forward block whose whole output is scaled; with
        scale 0 the block is removed, bias included.
    hidden: a HiddenPlan, or None: the residual stream keeps its width.
    metadata: anything that JSON can hold, kept with the plan.

Raises:
    ValueError: units that are not ascending, different and in range, a scale that is missing or
        not finite, a name that occurs twice, no hidden dimension left, or a block of scale 0 with
        heads or neurons left.
)";

std::vector<double> scales(const std::optional<std::vector<double>>& scale, size_t count) {
  return scale.value_or(std::vector<double>(count, 1.0));
}

void bind_parts(py::module_& m) {
  py::class_<FfnPlan>(m, "FfnPlan",
                      "The neurons of one feed-forward network that stay, and their scales.")
      .def(py::init([](const std::string& name, int64_t num_neurons, std::vector<int64_t> neurons,
                       const std::optional<std::vector<double>>& scale) {
             auto all = scales(scale, neurons.size());
             return FfnPlan{name, num_neurons, std::move(neurons), std::move(all)};
           }),
           py::arg("name"), py::arg("num_neurons"), py::arg("neurons"),
           py::arg("scale") = py::none())
      .def_readonly("name", &FfnPlan::name, "Of the network's first linear layer.")
      .def_readonly("num_neurons", &FfnPlan::num_neurons, "Neurons of the network, before.")
      .def_readonly("neurons", &FfnPlan::neurons, "Those that stay, ascending.")
      .def_readonly("scale", &FfnPlan::scale, "What multiplies each one's activation.")
      .def("__eq__", &FfnPlan::operator==, py::is_operator())
      .def("__repr__", [](const FfnPlan& plan) {
        return py::str("FfnPlan(name={!r}, neurons={} of {})")
            .format(plan.name, plan.neurons.size(), plan.num_neurons);
      });
  py::class_<BlockPlan>(m, "BlockPlan",
                        "What multiplies the whole output of an attention or feed-forward block.")
      .def(py::init([](const std::string& name, double scale) { return BlockPlan{name, scale}; }),
           py::arg("name"), py::arg("scale") = 0.0)
      .def_readonly("name", &BlockPlan::name,
                    "Of the attention layer, or of the first linear layer.")
      .def_readonly("scale", &BlockPlan::scale, "0: the block is removed, its bias included.")
      .def("__eq__", &BlockPlan::operator==, py::is_operator())
      .def("__repr__", [](const BlockPlan& plan) {
        return py::str("BlockPlan(name={!r}, scale={})").format(plan.name, plan.scale);
      });
  py::class_<HiddenPlan>(m, "HiddenPlan", "The dimensions of the residual stream that stay.")
      .def(py::init([](int64_t size, std::vector<int64_t> dimensions,
                       const std::optional<std::vector<double>>& scale) {
             auto all = scales(scale, dimensions.size());
             return HiddenPlan{size, std::move(dimensions), std::move(all)};
           }),
           py::arg("size"), py::arg("dimensions"), py::arg("scale") = py::none())
      .def_readonly("size", &HiddenPlan::size, "Of the stream, before.")
      .def_readonly("dimensions", &HiddenPlan::dimensions, "Those that stay, ascending.")
      .def_readonly("scale", &HiddenPlan::scale, "What multiplies what is written to each.")
      .def("__eq__", &HiddenPlan::operator==, py::is_operator())
      .def("__repr__", [](const HiddenPlan& plan) {
        return py::str("HiddenPlan(dimensions={} of {})").format(plan.dimensions.size(), plan.size);
      });
}

void bind_plan(py::module_& m) {
  py::class_<StructurePlan>(m, "StructurePlan", kStructurePlanDoc)
      .def(py::init([](HeadPlan heads, std::vector<FfnPlan> ffn, std::vector<BlockPlan> blocks,
                       std::optional<HiddenPlan> hidden, const py::object& metadata) {
             return StructurePlan(std::move(heads), std::move(ffn), std::move(blocks),
                                  std::move(hidden), to_json_text(metadata));
           }),
           py::arg("heads"), py::arg("ffn") = std::vector<FfnPlan>{},
           py::arg("blocks") = std::vector<BlockPlan>{}, py::arg("hidden") = py::none(),
           py::arg("metadata") = py::none())
      .def_property_readonly("heads", &StructurePlan::heads)
      .def_property_readonly("ffn", &StructurePlan::ffn)
      .def_property_readonly("blocks", &StructurePlan::blocks)
      .def_property_readonly("hidden", &StructurePlan::hidden)
      .def_property_readonly("metadata",
                             [](const StructurePlan& p) { return from_json_text(p.metadata()); })
      .def("block_scale", &StructurePlan::block_scale, py::arg("name"),
           "What multiplies the output of the block: 1 where the plan does not name it.")
      .def_property_readonly("num_neurons", &StructurePlan::num_neurons)
      .def_property_readonly("neurons_kept", &StructurePlan::neurons_kept)
      .def("to_json", &StructurePlan::to_json, py::arg("indent") = 1)
      .def_static(
          "from_json", [](const py::str& text) { return StructurePlan::from_json(text_of(text)); },
          py::arg("text"),
          "Also reads the JSON of a HeadPlan. Raises ValueError naming the key that is "
          "unknown, missing or wrong.")
      .def(
          "save",
          [](const StructurePlan& p, const std::filesystem::path& path) { p.save(path.string()); },
          py::arg("path"), "Writes the JSON to a file, atomically.")
      .def_static(
          "load",
          [](const std::filesystem::path& path) { return StructurePlan::load(path.string()); },
          py::arg("path"))
      .def("__eq__", &StructurePlan::operator==, py::is_operator())
      .def(py::pickle([](const StructurePlan& p) { return p.to_json(); },
                      [](const std::string& text) { return StructurePlan::from_json(text); }))
      .def("__deepcopy__", [](const StructurePlan& p, const py::dict&) { return p; })
      .def("__repr__", [](const StructurePlan& p) {
        py::str hidden("all");
        if (p.hidden()) {
          hidden = py::str("{} of {}").format(p.hidden()->dimensions.size(), p.hidden()->size);
        }
        return py::str("StructurePlan(heads={} of {}, neurons={} of {}, blocks={}, hidden={})")
            .format(p.heads().heads_kept(), p.heads().num_heads(), p.neurons_kept(),
                    p.num_neurons(), p.blocks().size(), hidden);
      });
}

}  // namespace

void bind_structured(py::module_& m) {
  bind_parts(m);
  bind_plan(m);
  m.def("prune_attention", &headwise::prune_attention, py::arg("parameters"), py::arg("layer"),
        py::arg("block_scale"));
  m.def("prune_ffn", &headwise::prune_ffn, py::arg("parameters"), py::arg("plan"),
        py::arg("block_scale"));
  m.def("prune_hidden", &headwise::prune_hidden, py::arg("parameter"), py::arg("dim"),
        py::arg("plan"), py::arg("scaled"));
  m.def("head_macs", &headwise::head_macs, py::arg("tokens"), py::arg("width"),
        py::arg("head_dim"));
  m.def("neuron_macs", &headwise::neuron_macs, py::arg("tokens"), py::arg("width"));
}

// headwise._C.Explanation: which headwise.explain fills.
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/explain.h"

namespace py = pybind11;
using headwise::AttentionProbe;
using headwise::ExplainOptions;
using headwise::Explanation;

namespace {

using OptionalTensor = std::optional<at::Tensor>;

headwise::Selection selection_of(const py::tuple& given) {
  const auto tensor = [&](size_t i) {
    return given[i].is_none() ? at::Tensor() : given[i].cast<at::Tensor>();
  };
  return {tensor(0), tensor(1), tensor(2), tensor(3), tensor(4)};
}

void add_layer(Explanation& self, const std::string& name, int64_t num_heads,
               const std::string& gate, const headwise::NamedTensors& gate_tensors,
               const at::Tensor& x, const OptionalTensor& query_padding_mask,
               const std::optional<py::tuple>& selection, const at::Tensor& q, const at::Tensor& k,
               const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask,
               bool is_causal, int64_t added_keys) {
  AttentionProbe probe{x, query_padding_mask, {}, q, k, {}, added_keys};
  if (selection) probe.selection = selection_of(*selection);
  probe.arguments.key_padding_mask = key_padding_mask;
  probe.arguments.attn_mask = attn_mask;
  probe.arguments.is_causal = is_causal;
  const py::gil_scoped_release release;
  self.add_layer(name, num_heads, gate, gate_tensors, probe);
}

}  // namespace

void bind_explain(py::module_& m) {
  py::class_<Explanation>(m, "Explanation")
      .def(py::init([](int64_t pairs, int64_t steps, bool all_maps,
                       const std::vector<headwise::SiteHead>& maps) {
             return Explanation(
                 ExplainOptions().pairs(pairs).steps(steps).all_maps(all_maps).maps(maps));
           }),
           py::kw_only(), py::arg("pairs"), py::arg("steps"), py::arg("all_maps"), py::arg("maps"))
      .def("add_layer", add_layer, py::kw_only(), py::arg("name"), py::arg("num_heads"),
           py::arg("gate"), py::arg("gate_tensors"), py::arg("x"),
           py::arg("query_padding_mask").none(true), py::arg("selection").none(true), py::arg("q"),
           py::arg("k"), py::arg("key_padding_mask").none(true), py::arg("attn_mask").none(true),
           py::arg("is_causal"), py::arg("added_keys"))
      .def("set_prediction", &Explanation::set_prediction, py::arg("logits"), py::arg("labels"))
      .def("set_inputs", &Explanation::set_inputs, py::arg("texts"), py::arg("tokens"))
      .def_property_readonly("num_inputs", &Explanation::num_inputs)
      .def_property_readonly("num_heads", &Explanation::num_heads)
      .def("switched", &Explanation::switched, py::arg("input"), py::arg("begin"), py::arg("end"))
      .def("add_effects", &Explanation::add_effects, py::arg("input"), py::arg("begin"),
           py::arg("logits"))
      .def("to_json", &Explanation::to_json, py::arg("indent") = -1);
}

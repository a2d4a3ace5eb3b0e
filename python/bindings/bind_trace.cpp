// headwise._C.Trace: the recorder under headwise.explain.tracing.
#include <pybind11/stl.h>
#include <torch/extension.h>

#include "headwise/trace.h"

namespace py = pybind11;
using headwise::Selection;
using headwise::Trace;
using headwise::TraceSummary;

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using SelectionTuple =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, OptionalTensor, OptionalTensor>;

SelectionTuple to_tuple(const Selection& s) {
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
  };
  return {s.index, s.count, s.weight, optional(s.relevance), optional(s.budget)};
}

}  // namespace

void bind_trace(py::module_& m) {
  py::class_<TraceSummary>(m, "TraceSummary", "How heads were spread over the inputs of a trace")
      .def_readonly("sequences", &TraceSummary::sequences)
      .def_readonly("mean_heads", &TraceSummary::mean_heads)
      .def_readonly("mean_fraction", &TraceSummary::mean_fraction)
      .def_readonly("std_fraction", &TraceSummary::std_fraction)
      .def_readonly("mean_jaccard_distance", &TraceSummary::mean_jaccard_distance)
      .def("__repr__", [](const TraceSummary& s) {
        const py::object jaccard = py::cast(s.mean_jaccard_distance);
        return py::str(
                   "TraceSummary(sequences={}, mean_heads={:.4g}, mean_fraction={:.4g}, "
                   "std_fraction={:.4g}, mean_jaccard_distance={})")
            .format(s.sequences, s.mean_heads, s.mean_fraction, s.std_fraction,
                    jaccard.is_none() ? py::str("None") : py::str("{:.4g}").format(jaccard));
      });

  py::class_<Trace>(m, "Trace")
      .def(py::init<>())
      .def(
          "record",
          [](Trace& trace, const std::string& layer, int64_t num_heads, const at::Tensor& index,
             const at::Tensor& count, const at::Tensor& weight, const OptionalTensor& relevance,
             const OptionalTensor& budget) {
            trace.record(layer, num_heads,
                         {index, count, weight, relevance.value_or(at::Tensor()),
                          budget.value_or(at::Tensor())});
          },
          py::arg("layer"), py::arg("num_heads"), py::arg("index"), py::arg("count"),
          py::arg("weight"), py::arg("relevance") = py::none(), py::arg("budget") = py::none())
      .def_property_readonly("layers", &Trace::layers)
      .def("num_heads", &Trace::num_heads, py::arg("layer"))
      .def(
          "history",
          [](const Trace& trace, const std::string& layer) {
            std::vector<SelectionTuple> calls;
            for (const Selection& call : trace.history(layer)) calls.push_back(to_tuple(call));
            return calls;
          },
          py::arg("layer"))
      .def("summary", py::overload_cast<>(&Trace::summary, py::const_))
      .def("summary", py::overload_cast<const std::string&>(&Trace::summary, py::const_),
           py::arg("layer"))
      .def("to_json", &Trace::to_json, py::arg("indent") = -1)
      .def("clear", &Trace::clear);
}

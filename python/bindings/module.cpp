// The Python extension headwise._C. Loading it also loads libheadwise, which registers the
// operators (torch.ops.headwise.*). Each bind_* function is in the file of its subject.
#include <torch/extension.h>

#include "errors.h"
#include "headwise/version.h"

void bind_explain(pybind11::module_& m);
void bind_importance(pybind11::module_& m);
void bind_pruning(pybind11::module_& m);
void bind_searches(pybind11::module_& m);
void bind_backends(pybind11::module_& m);
void bind_gates(pybind11::module_& m);
void bind_kwon(pybind11::module_& m);
void bind_repair(pybind11::module_& m);
void bind_structured(pybind11::module_& m);
void bind_trace(pybind11::module_& m);
void bind_weights(pybind11::module_& m);

PYBIND11_MODULE(_C, m) {
  translate_errors();
  m.doc() = "C++ core of headwise";
  m.attr("__version__") = headwise::version();
  m.attr("compiled_torch_version") = headwise::compiled_torch_version();
  bind_explain(m);
  bind_importance(m);
  bind_pruning(m);
  bind_searches(m);
  bind_backends(m);
  bind_gates(m);
  bind_kwon(m);
  bind_repair(m);
  bind_structured(m);
  bind_trace(m);
  bind_weights(m);
}

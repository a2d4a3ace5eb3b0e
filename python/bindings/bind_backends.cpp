#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "headwise/backends.h"
#include "shown.h"

namespace {

using headwise::CudaAttention;
using headwise::CudaProducts;
using Names = std::pair<std::string, std::string>;

bool second(const char* argument, const std::string& value, const char* first, const char* other) {
  if (value != first && value != other) {
    throw pybind11::value_error(std::string(argument) + " must be '" + first + "' or '" + other +
                                "', got " + headwise::shown(value, 60, '\''));
  }
  return value == other;
}

Names set_cuda_routes(const std::string& attention, const std::string& products) {
  const bool flash = second("attention", attention, "kernels", "flash");
  const bool warpgroups = second("products", products, "warps", "warpgroups");
  const auto before =
      headwise::set_cuda_routes({flash ? CudaAttention::flash : CudaAttention::kernels,
                                 warpgroups ? CudaProducts::warpgroups : CudaProducts::warps});
  return {before.attention == CudaAttention::flash ? "flash" : "kernels",
          before.products == CudaProducts::warpgroups ? "warpgroups" : "warps"};
}

}  // namespace

void bind_backends(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<headwise::Backend>(m, "Backend", "One way to execute a selection.")
      .def_readonly("name", &headwise::Backend::name)
      .def_readonly("device", &headwise::Backend::device, "'cuda' or 'cpu'")
      .def_readonly("available", &headwise::Backend::available,
                    "whether it runs on this machine, with this build")
      .def_readonly("reason", &headwise::Backend::reason,
                    "why it cannot run, or what is known of it")
      .def("__repr__", [](const headwise::Backend& b) {
        return "Backend(name='" + b.name + "', device='" + b.device +
               "', available=" + (b.available ? "True" : "False") + ", reason='" + b.reason + "')";
      });
  m.def("backends", &headwise::backends,
        "Every backend of the attention operators, for each device the fastest first: the order in "
        "which they are tried, each with the reason why it cannot run, or what is known of it.");
  m.def(
      "set_cuda_routes", &set_cuda_routes, py::arg("attention") = "kernels",
      py::arg("products") = "warps",
      "Sets how attention (\"kernels\", or \"flash\": LibTorch's FlashAttention for what it takes) "
      "and matrix products (\"warps\", or on Hopper \"warpgroups\") run on CUDA devices, for every "
      "later call in the process. Returns the two until now: ``set_cuda_routes(*before)`` restores "
      "them.");
}

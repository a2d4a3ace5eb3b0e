// torch.ops.headwise_emulated: what a CUDA device runs, on the host.
// tests/python/ops/test_emulated.py loads it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "emulator/memory.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/attention_statistics.h"
#include "ops/cuda/budget_gate.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/selected.h"
#include "ops/route.h"

namespace headwise::emulator {
int faulty(int fault, const float* from, float* to);  // faults.h
}

namespace headwise::ops::device {
namespace {

using at::Tensor;

struct Route {
  static auto forward(const auto& in) { return device::forward(in); }
  static auto backward(const auto&... arguments) { return device::backward(arguments...); }
};
using Call = Registered<Route>;

Tensor select_heads(const Tensor& relevance, const Tensor& count) {
  const auto counts = count.to(at::kLong).contiguous();
  auto index = at::empty(relevance.sizes(), relevance.options().dtype(at::kInt));
  check_launch(kernels::cuda::select_heads(
      relevance.const_data_ptr(), element_of(relevance.scalar_type()),
      counts.const_data_ptr<int64_t>(), index.mutable_data_ptr<int32_t>(), relevance.size(0),
      relevance.size(1), current_stream()));
  return index;
}

/// Copies between tensor [B, Hs, R, w] and packed [N, R, w] for pairs (batch[i], head[i]).
Tensor gather_heads(const Tensor& tensor, const Tensor& batch, const Tensor& head, int64_t group) {
  auto packed = at::empty({batch.size(0), tensor.size(2), tensor.size(3)}, tensor.options());
  check_launch(
      kernels::cuda::gather_heads({tensor.size(2), tensor.size(3), group, tensor.stride(0),
                                   tensor.stride(1), tensor.stride(2), tensor.stride(3)},
                                  tensor.const_data_ptr(), static_cast<int>(tensor.element_size()),
                                  batch.const_data_ptr<int32_t>(), head.const_data_ptr<int32_t>(),
                                  batch.size(0), packed.mutable_data_ptr(), current_stream()));
  return packed;
}
void scatter_heads(const Tensor& packed, const Tensor& batch, const Tensor& head,
                   const Tensor& tensor) {
  check_launch(
      kernels::cuda::scatter_heads({tensor.size(2), tensor.size(3), 1, tensor.stride(0),
                                    tensor.stride(1), tensor.stride(2), tensor.stride(3)},
                                   packed.const_data_ptr(), static_cast<int>(packed.element_size()),
                                   batch.const_data_ptr<int32_t>(), head.const_data_ptr<int32_t>(),
                                   batch.size(0), tensor.mutable_data_ptr(), current_stream()));
}

/// Runs a kernel with a mistake of emulator/faults.h.
Tensor faulty(int64_t fault) {
  const auto from = at::rand({256}), to = at::zeros({128});
  check_launch(emulator::faulty(static_cast<int>(fault), from.const_data_ptr<float>(),
                                to.mutable_data_ptr<float>()));
  return to;
}

}  // namespace

TORCH_LIBRARY(headwise_emulated, m) {
  // In evaluation, where nothing is kept for a backward.
  m.def("self_attention", [](HEADWISE_SELF_PARAMETERS) {
    return std::get<0>(forward(HEADWISE_SELF_INPUTS, /*keep=*/false));
  });
  m.def("self_attention_forward", Call::self_forward);
  m.def("self_attention_backward", Call::self_backward);
  m.def("multihead_attention_forward", Call::multihead_forward);
  m.def("multihead_attention_backward", Call::multihead_backward);
  m.def("attention_forward", Call::core_forward);
  m.def("attention_backward", Call::core_backward);
  m.def("budget_gate", budget_gate);
  m.def("select_heads", select_heads);
  m.def("_work_list", [](const Tensor& index, const Tensor& count, int64_t num_heads) {
    return select(index, count, num_heads).lists;
  });
  m.def("takes_budget_gate", takes_budget_gate);
  m.def("attention_statistics", attention_statistics);
  m.def("gather_heads", gather_heads);
  m.def("scatter_heads", scatter_heads);
  m.def("faulty", faulty);
  m.def("watch", [](bool on) {
    emulator::memory::watch_tensors(on);
    return emulator::memory::watched();
  });
}

}  // namespace headwise::ops::device

#include "ops/attention_statistics.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/attention.h"
#ifdef HEADWISE_CUDA
#include "ops/cuda/launch.h"
#include "ops/cuda/statistics.h"
#endif

namespace headwise::ops {
namespace {

// Where the kernels were not compiled, or the device is too old for them.
Statistics statistics_on_host(HEADWISE_STATISTICS_PARAMETERS) {
  const auto host = [](const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(t->cpu()) : std::nullopt;
  };
  check_inputs({HEADWISE_STATISTICS_ARGUMENTS});
  auto [entropy, confidence] =
      headwise::attention_statistics(q.cpu(), k.cpu(), host(key_padding_mask),
                                     host(query_padding_mask), host(attn_mask), is_causal, scale);
  return {entropy.to(q.device()), confidence.to(q.device())};
}

#ifdef HEADWISE_CUDA
Statistics statistics_cuda(HEADWISE_STATISTICS_PARAMETERS) {
  if (!device_fits(q.device())) return statistics_on_host(HEADWISE_STATISTICS_ARGUMENTS);
  check_inputs({HEADWISE_STATISTICS_ARGUMENTS});
  return device::attention_statistics(HEADWISE_STATISTICS_ARGUMENTS);
}
#endif

TORCH_LIBRARY_IMPL(headwise, CUDA, m) {
#ifdef HEADWISE_CUDA
  m.impl("attention_statistics", statistics_cuda);
#else
  m.impl("attention_statistics", statistics_on_host);
#endif
}

}  // namespace
}  // namespace headwise::ops

// The module of SharedHeadsGate; its formulas are in shared_heads.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <set>

#include "gates/helpers.h"
#include "gates/model_gates.h"
#include "headwise/gates.h"
#include "ops/gates/shared_heads.h"

namespace headwise {

SharedHeadsGateImpl::SharedHeadsGateImpl(SharedHeadsGateOptions options_, int64_t embed_dim,
                                         int64_t num_heads, const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads), options(std::move(options_)) {
  auto& heads = options.shared();
  std::sort(heads.begin(), heads.end());
  TORCH_CHECK_VALUE(heads.empty() || heads.back() < num_heads, "shared must be in 0..",
                    num_heads - 1, ", got ", heads.back());
  const auto always = static_cast<int64_t>(options.shared().size());
  shared = register_buffer("shared",
                           torch::tensor(options.shared(), at::kLong).to(tensor_options.device()));
  gate = register_module(
      "gate", make_inner_gate(options.gate(), embed_dim, num_heads - always, tensor_options));
}

void SharedHeadsGateImpl::reset_parameters() {
  shared.copy_(torch::tensor(options.shared(), at::kLong));
  gate->reset_parameters();
}

void SharedHeadsGateImpl::reset() {
  GateImpl::reset();
  gate->reset();
}

void SharedHeadsGateImpl::start_from(const at::Tensor& relevance, double budget) {
  TORCH_CHECK_VALUE(relevance.sizes() == at::IntArrayRef({num_heads()}),
                    "relevance must have shape [", num_heads(), "], got ", relevance.sizes());
  const int64_t always = shared.size(0), routed = num_heads() - always;
  const auto order = relevance.argsort(/*stable=*/true, 0, /*descending=*/true);
  shared.copy_(std::get<0>(order.narrow(0, 0, always).sort()));
  if (auto* inner = dynamic_cast<ScheduledGateImpl*>(gate.get()); inner != nullptr && routed > 0) {
    const auto rest = routed_first(shared.to(at::kLong), num_heads()).narrow(0, 0, routed);
    const double left = budget * static_cast<double>(num_heads()) - static_cast<double>(always);
    inner->start_from(relevance.index_select(0, rest),
                      std::clamp(left / static_cast<double>(routed), 0.0, 1.0));
  }
}

Selection SharedHeadsGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const auto routed = gate->forward(x, key_padding_mask);
  const auto scores = routed.relevance.defined() ? routed.relevance : routed.weight.detach();
  // Module::to(dtype) converts every buffer.
  const auto [index, count, weight, relevance] =
      share_heads(routed.index, routed.count, routed.weight, scores, shared.to(at::kLong));
  if (records()) {
    expected_heads = gate->expected_heads.defined()
                         ? gate->expected_heads + static_cast<double>(shared.size(0))
                         : at::Tensor();
  }
  return {index, count, weight, relevance, routed.budget};
}

}  // namespace headwise

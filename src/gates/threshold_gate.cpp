// The module of ThresholdGate; its formulas are in threshold.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include "gates/helpers.h"
#include "headwise/gates.h"
#include "ops/gates/threshold.h"

namespace headwise {

ThresholdGateImpl::ThresholdGateImpl(ThresholdGateOptions options_, int64_t embed_dim,
                                     int64_t num_heads, const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads), options(std::move(options_)) {
  threshold = register_buffer("threshold", torch::empty({}, tensor_options.dtype(at::kFloat)));
  reset_parameters();
}

void ThresholdGateImpl::reset_parameters() { threshold.fill_(options.threshold()); }

Selection ThresholdGateImpl::forward(const at::Tensor&, const at::Tensor&) {
  TORCH_CHECK(false, "ThresholdGate chooses by queries and keys: it works as the gate of a layer");
}

Selection ThresholdGateImpl::forward_heads(const HeadInputs& heads) {
  const auto [blocks, visible, importance] =
      integer_importance(heads.q, heads.k, heads.key_padding_mask, heads.query_padding_mask,
                         heads.attn_mask, heads.is_causal, options.resolution(), options.block(),
                         options.normalize(), heads.added_keys);
  const auto [index, count] = select_above(importance, threshold, options.min_heads());
  const auto weight = selection_mask(index, count, heads.q.scalar_type());  // [B, H]
  if (is_training()) {
    if (records()) expected_heads = weight.sum(1);
    if (run_all()) {
      auto all = select_all(weight.size(0), num_heads(), weight.options());
      return {all.index, all.count, weight, importance, {}};
    }
  }
  return {index, count, weight, importance, {}};
}

bool ThresholdGateImpl::attends() const {
  return options.block_ratio().has_value() || options.approximate();
}

at::Tensor ThresholdGateImpl::attend(const HeadInputs& heads, const at::Tensor& v) {
  return hybrid_attention(heads.q, heads.k, v, heads.key_padding_mask, heads.query_padding_mask,
                          heads.attn_mask, heads.is_causal, options.resolution(), options.block(),
                          options.block_ratio(), options.approximate(), heads.added_keys);
}

}  // namespace headwise

// The arguments of attention_statistics, checked once for every device. Sizes are SymInts, so that
// tracing uses the same checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <tuple>

namespace headwise::ops {

struct StatisticsInputs {
  const at::Tensor& q;                                  // [B, H, L, d]
  const at::Tensor& k;                                  // [B, Hkv, S, d]
  const std::optional<at::Tensor>& key_padding_mask;    // bool or floating [B, S]
  const std::optional<at::Tensor>& query_padding_mask;  // bool [B, L]
  const std::optional<at::Tensor>& attn_mask;           // broadcastable to [B, H, L, S]
  bool is_causal;
  std::optional<double> scale;
};

#define HEADWISE_STATISTICS_PARAMETERS                                                        \
  const at::Tensor &q, const at::Tensor &k, const std::optional<at::Tensor>&key_padding_mask, \
      const std::optional<at::Tensor>&query_padding_mask,                                     \
      const std::optional<at::Tensor>&attn_mask, bool is_causal, std::optional<double> scale
#define HEADWISE_STATISTICS_ARGUMENTS \
  q, k, key_padding_mask, query_padding_mask, attn_mask, is_causal, scale

using Statistics = std::tuple<at::Tensor, at::Tensor>;

/// Shapes, dtypes and devices; reads no values.
void check_inputs(const StatisticsInputs& in);

/// float64 for float64, float32 for everything below.
inline at::ScalarType statistics_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace headwise::ops

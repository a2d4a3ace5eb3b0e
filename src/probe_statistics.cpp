#include "probe_statistics.h"

#include <ATen/ATen.h>

#include <cmath>

#include "headwise/attention.h"

namespace headwise {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// The masks over all S' keys; the added ones are always visible.
OptionalTensor with_added_keys(const OptionalTensor& mask, int64_t added) {
  if (!mask || added == 0 || mask->size(-1) == 1) return mask;
  return at::constant_pad_nd(*mask, {0, added});
}

}  // namespace

at::Tensor is_padding(const at::Tensor& mask) {
  return mask.scalar_type() == at::kBool ? mask : mask.eq(-INFINITY);
}

std::tuple<at::Tensor, at::Tensor> probe_statistics(const AttentionProbe& probe) {
  OptionalTensor queries;
  if (probe.query_padding_mask) queries = is_padding(*probe.query_padding_mask);
  return attention_statistics(probe.q, probe.k,
                              with_added_keys(probe.arguments.key_padding_mask, probe.added_keys),
                              queries, with_added_keys(probe.arguments.attn_mask, probe.added_keys),
                              probe.arguments.is_causal);
}

}  // namespace headwise

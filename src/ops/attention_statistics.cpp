// The device-independent part of attention_statistics: checks, shapes for tracing, the entropy
// alone, and the error of a backward.
#include "ops/attention_statistics.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "headwise/attention.h"

namespace headwise::ops {
namespace {

void check_mask(const std::optional<at::Tensor>& mask, const char* name, bool floating_allowed,
                const at::Tensor& q) {
  if (!mask) return;
  const bool boolean = mask->scalar_type() == at::kBool;
  if (floating_allowed) {
    TORCH_CHECK_TYPE(boolean || mask->is_floating_point(), name,
                     " must be boolean or floating, got ", mask->scalar_type());
  } else {
    TORCH_CHECK_TYPE(boolean, name, " must be boolean, got ", mask->scalar_type());
  }
  TORCH_CHECK_VALUE(mask->device() == q.device(), name, " must be on the device of q, ", q.device(),
                    ", got ", mask->device());
}

}  // namespace

void check_inputs(const StatisticsInputs& in) {
  const auto &q = in.q, &k = in.k;
  TORCH_CHECK_VALUE(q.dim() == 4, "q must have shape [B, H, L, d], got ", q.sym_sizes());
  TORCH_CHECK_VALUE(k.dim() == 4, "k must have shape [B, Hkv, S, d], got ", k.sym_sizes());
  TORCH_CHECK_TYPE(q.is_floating_point(), "q must be a floating-point tensor, got ",
                   q.scalar_type());
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type(), "k must have the dtype of q, ",
                   q.scalar_type(), ", got ", k.scalar_type());
  TORCH_CHECK_VALUE(k.device() == q.device(), "k must be on the device of q, ", q.device(),
                    ", got ", k.device());
  const auto batch = q.sym_size(0), heads = q.sym_size(1), queries = q.sym_size(2);
  const auto kv_heads = k.sym_size(1), keys = k.sym_size(2);
  TORCH_CHECK_VALUE(k.sym_size(0) == batch && k.sym_size(3) == q.sym_size(3),
                    "k must have the batch size and head width of q, ", q.sym_sizes(), ", got ",
                    k.sym_sizes());
  TORCH_CHECK_VALUE(kv_heads == 0 ? heads == 0 : heads % kv_heads == 0,
                    "the heads of k must divide the heads of q (", heads, "), got ", kv_heads);
  check_mask(in.key_padding_mask, "key_padding_mask", true, q);
  check_mask(in.query_padding_mask, "query_padding_mask", false, q);
  check_mask(in.attn_mask, "attn_mask", true, q);
  if (in.key_padding_mask) {
    const auto& m = *in.key_padding_mask;
    TORCH_CHECK_VALUE(m.dim() == 2 && m.sym_size(0) == batch && m.sym_size(1) == keys,
                      "key_padding_mask must have shape [", batch, ", ", keys, "], got ",
                      m.sym_sizes());
  }
  if (in.query_padding_mask) {
    const auto& m = *in.query_padding_mask;
    TORCH_CHECK_VALUE(m.dim() == 2 && m.sym_size(0) == batch && m.sym_size(1) == queries,
                      "query_padding_mask must have shape [", batch, ", ", queries, "], got ",
                      m.sym_sizes());
  }
  if (in.attn_mask) {
    const auto& m = *in.attn_mask;
    const c10::SymInt full[4] = {batch, heads, queries, keys};
    bool fits = m.dim() <= 4;
    for (int64_t i = 1; fits && i <= m.dim(); ++i)
      fits = m.sym_size(-i) == full[4 - i] || m.sym_size(-i) == 1;
    TORCH_CHECK_VALUE(fits, "attn_mask must be broadcastable to [", batch, ", ", heads, ", ",
                      queries, ", ", keys, "], got ", m.sym_sizes());
  }
}

namespace {

at::Tensor entropy(HEADWISE_STATISTICS_PARAMETERS) {
  return std::get<0>(headwise::attention_statistics(HEADWISE_STATISTICS_ARGUMENTS));
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) { m.impl("attention_entropy", entropy); }
// Backward through a statistic raises instead of giving zero: it has no derivative.
TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("attention_statistics", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise::ops

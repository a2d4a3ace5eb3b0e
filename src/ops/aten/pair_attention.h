// Attention over packed active pairs by LibTorch's own attention and matrix products, on any
// device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "headwise/attention.h"
#include "ops/aten/work_list.h"

namespace headwise::ops::aten {

/// What all pairs share.
struct PairAttention {
  const AttentionArguments& arguments;
  const WorkList& list;
  int64_t batch, num_heads;
  int64_t added = 0;  ///< the last rows of k and v, outside every mask
};

/// q [N, L, d], k [N, S + added, d], v [N, S + added, dv] -> context [N, L, dv]; zeros in rows that
/// see no key.
at::Tensor attention_forward(const PairAttention& a, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v);

/// Gradients of q, k, v from that of the context, in the accumulation type; the probabilities are
/// computed again, a bounded number of pairs at a time. With `mask_gradient`, also the gradient
/// with respect to attn_mask, in its shape.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const PairAttention& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& grad_context, bool mask_gradient);

}  // namespace headwise::ops::aten

// Stands in for LibTorch's FlashAttention, which has no CPU kernel: the same layout of rows, in
// plain operators. What no sequence covers is left as it was allocated.
#include "ops/cuda/flash.h"

#include <ATen/ATen.h>

#include <cmath>

namespace headwise::ops::device {
namespace {

using at::Tensor;

struct Sequence {
  Tensor q, k, v, p, lse;  // [L, d], [S, d], [S, d], [L, S], [L] in float
  int64_t first, rows, first_key, keys;
};

template <typename Visit>
void each(const Tensor& q, const Tensor& k, const Tensor& v, const FlashShape& shape,
          const std::optional<Tensor>& keys_used, const Visit& visit) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && q.stride(2) == 1);
  TORCH_CHECK(shape.begins_q.is_contiguous() && shape.begins_k.is_contiguous());
  TORCH_CHECK(shape.begins_q.scalar_type() == at::kInt && shape.begins_k.scalar_type() == at::kInt);
  TORCH_CHECK(!keys_used || keys_used->numel() == shape.begins_q.numel() - 1);
  const auto* at_q = shape.begins_q.const_data_ptr<int32_t>();
  const auto* at_k = shape.begins_k.const_data_ptr<int32_t>();
  for (int64_t i = 0; i + 1 < shape.begins_q.numel(); ++i) {
    Sequence s{};
    s.first = at_q[i], s.rows = at_q[i + 1] - at_q[i];
    s.first_key = at_k[i];
    s.keys = keys_used ? keys_used->const_data_ptr<int32_t>()[i] : at_k[i + 1] - at_k[i];
    TORCH_CHECK(s.rows >= 0 && s.rows <= shape.queries && s.keys >= 0 && s.keys <= shape.keys);
    if (s.rows == 0) continue;
    const auto part = [](const Tensor& t, int64_t first, int64_t size) {
      return t.narrow(0, first, size).select(1, 0).to(at::kFloat);
    };
    s.q = part(q, s.first, s.rows), s.k = part(k, s.first_key, s.keys);
    s.v = part(v, s.first_key, s.keys);
    auto scores = at::mul(at::mm(s.q, s.k.t()), shape.scale);  // [L, S]
    if (shape.causal)
      scores.masked_fill_(at::ones_like(scores).triu_(s.keys - s.rows + 1).to(at::kBool),
                          -INFINITY);
    s.p = at::softmax(scores, 1);
    s.lse = s.keys ? at::logsumexp(scores, {1}) : at::full({s.rows}, INFINITY);
    visit(s);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> flash_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const FlashShape& shape,
                                         const std::optional<Tensor>& keys_used) {
  auto context = at::empty_like(q);
  auto lse = at::empty({1, q.size(0)}, q.options().dtype(at::kFloat));
  each(q, k, v, shape, keys_used, [&](const Sequence& s) {
    context.narrow(0, s.first, s.rows).select(1, 0).copy_(at::mm(s.p, s.v));
    lse.narrow(1, s.first, s.rows).copy_(s.lse);
  });
  return {context, lse};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& grad_context, const Tensor& q,
                                                  const Tensor& k, const Tensor& v,
                                                  const Tensor& context, const Tensor& lse,
                                                  const FlashShape& shape) {
  auto dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  each(q, k, v, shape, std::nullopt, [&](const Sequence& s) {
    const auto rows = [&](const Tensor& t) {
      return t.narrow(0, s.first, s.rows).select(1, 0).to(at::kFloat);
    };
    TORCH_CHECK(at::allclose(s.lse, lse.view({-1}).narrow(0, s.first, s.rows), 1e-2, 1e-2));
    const auto grad = rows(grad_context);
    const auto delta = at::mul(grad, rows(context)).sum(1, true);
    const auto ds = at::mul(s.p, at::mm(grad, s.v.t()) - delta);
    dq.narrow(0, s.first, s.rows).select(1, 0).copy_(at::mm(ds, s.k).mul_(shape.scale));
    dk.narrow(0, s.first_key, s.keys).select(1, 0).copy_(at::mm(ds.t(), s.q).mul_(shape.scale));
    dv.narrow(0, s.first_key, s.keys).select(1, 0).copy_(at::mm(s.p.t(), grad));
  });
  return {dq, dk, dv};
}

}  // namespace headwise::ops::device

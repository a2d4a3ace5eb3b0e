// The core: q, k, v are given; active heads are gathered, attended and scattered back.
#include <ATen/ATen.h>

#include "ops/aten/attention.h"
#include "ops/aten/pair_attention.h"

namespace headwise::ops::aten {
namespace {

using at::Tensor;

int64_t group_of(const CoreInputs& in) { return in.k.size(1) ? in.q.size(1) / in.k.size(1) : 1; }

}  // namespace

CoreForward forward(const CoreInputs& in) {
  check_inputs(in);
  const int64_t B = in.q.size(0), H = in.q.size(1), L = in.q.size(2), group = group_of(in);
  const auto list = make_work_list(in.index, in.count, H);
  const PairAttention attention{in.arguments, list, B, H};
  const auto context =
      attention_forward(attention, gather_heads(in.q, list), gather_heads(in.k, list, group),
                        gather_heads(in.v, list, group));  // [N, L, dv]
  const auto lse = at::zeros({B, H, L}, in.q.options().dtype(lse_type(in.q.scalar_type())));
  if (!in.weight) return {scatter_heads(context, list, B, H), at::empty({0}, in.q.options()), lse};
  const auto weighted = context * pair_weight(*in.weight, list, context.scalar_type());
  return {scatter_heads(weighted, list, B, H), scatter_heads(context, list, B, H), lse};
}

CoreBackward backward(const Tensor& grad_output, const CoreInputs& in, const Tensor& /*output*/,
                      const Tensor& context, const Tensor& /*lse*/, const Needs<5>& needs) {
  const int64_t B = in.q.size(0), H = in.q.size(1), group = group_of(in);
  const auto type = lse_type(in.q.scalar_type());
  const auto list = make_work_list(in.index, in.count, H);
  const auto q = gather_heads(in.q, list), k = gather_heads(in.k, list, group),
             v = gather_heads(in.v, list, group);
  auto grad = gather_heads(grad_output, list).to(type);  // [N, L, dv]
  Tensor grad_weight;
  if (in.weight) {
    if (needs[3]) {
      const auto dots = (grad * gather_heads(context, list)).sum(at::IntArrayRef({1, 2}));  // [N]
      grad_weight = at::zeros(in.weight->sizes(), in.weight->options());
      grad_weight.index_put_({list.batches(), list.heads()}, dots.to(in.weight->scalar_type()));
    }
    grad = grad * pair_weight(*in.weight, list, type);
  }
  const PairAttention attention{in.arguments, list, B, H};
  auto [dq, dk, dv, dmask] = attention_backward(attention, q, k, v, grad, needs[4]);
  const auto none = [&] { return at::empty({0}, in.q.options()); };
  const auto shared = [&](const Tensor& grad, const Tensor& like) {  // sums over a group of heads
    auto total = scatter_heads(grad, list, B, H);                    // [B, H, S, .]
    if (group > 1) total = total.unflatten(1, {in.k.size(1), group}).sum(2);
    return total.to(like.scalar_type());
  };
  return {needs[0] ? scatter_heads(dq, list, B, H).to(in.q.scalar_type()) : none(),
          needs[1] ? shared(dk, in.k) : none(), needs[2] ? shared(dv, in.v) : none(),
          grad_weight.defined() ? grad_weight : none(), needs[4] ? dmask : none()};
}

}  // namespace headwise::ops::aten

// The layer, head by head: for each head, one matrix product over the sequences that chose it.
// Inputs are gathered per head, projections lie packed as [N, ., d] in the order of the work list.
#include <ATen/ATen.h>

#include "ops/aten/attention.h"
#include "ops/aten/pair_attention.h"
#include "ops/aten/projection.h"
#include "ops/multihead_form.h"

namespace headwise::ops::aten {
namespace {

using at::Tensor;

LayerGradients layer_backward(const Tensor& grad_output, const MultiheadInputs& in,
                              const LayerSaved& saved, const Needs<15>& needs) {
  const auto& w = in.weights;
  const auto& x = in.query;
  const auto type = lse_type(x.scalar_type());
  const int64_t e = w.q_weight.size(0), d = in.num_heads ? e / in.num_heads : 0;
  const int64_t S = in.key.size(1);
  const auto list = make_work_list(in.index, in.count, in.num_heads);
  const auto heads = chosen(list, in.num_heads, d);
  const auto packed = [&](const Tensor& t) {  // [B, K, R, d] -> [N, R, d]
    return t.reshape({t.size(0) * t.size(1), t.size(2), t.size(3)}).narrow(0, 0, list.size());
  };
  const auto q = packed(saved.q), k = packed(saved.k), v = packed(saved.v),
             context = packed(saved.context);
  LayerGradients g;
  if (needs[10]) g.out_proj_bias = grad_output.sum(at::IntArrayRef({0, 1}), false, type);
  const auto scale = pair_weight(in.weight, list, x.scalar_type());  // [N, 1, 1]
  auto [grad_context, grad_out_weight] =
      combine_backward(list, heads, grad_output, context * scale, w.out_proj_weight, needs[9]);
  g.out_proj_weight = grad_out_weight;
  if (needs[11]) {
    const auto dots =
        (grad_context.to(type) * context.to(type)).sum(at::IntArrayRef({1, 2}));  // [N]
    g.weight = at::zeros(in.weight.sizes(), in.weight.options());
    g.weight.index_put_({list.batches(), list.heads()}, dots.to(in.weight.scalar_type()));
  }
  grad_context.mul_(scale);
  const PairAttention attention{in.arguments, list, x.size(0), in.num_heads, added_rows(w)};
  auto [dq, dk, dv, dmask] = attention_backward(attention, q, k, v, grad_context, needs[14]);
  g.attn_mask = dmask;

  // One of query, key, value: its gradient, and those of its weight and bias.
  const auto project = [&](const Tensor& input, const Tensor& weight, const Tensor& grad,
                           std::array<bool, 3> need, Tensor& grad_input, Tensor& grad_weight,
                           Tensor& grad_bias) {
    auto of = project_backward(list, heads, input, weight, grad, need);
    grad_input = of.x, grad_weight = of.weight, grad_bias = of.bias;
  };
  project(in.query, w.q_weight, dq, {needs[0], needs[3], needs[6]}, g.query, g.q_weight, g.q_bias);
  project(in.key, w.k_weight, dk, {needs[1], needs[4], needs[7]}, g.key, g.k_weight, g.k_bias);
  project(in.value, w.v_weight, dv, {needs[2], needs[5], needs[8]}, g.value, g.v_weight, g.v_bias);
  const auto row_gradient = [&](bool need, const OptionalTensor& row, const Tensor& grad,
                                Tensor& result) {
    if (!need) return;
    result = at::zeros(row->sizes(), row->options());
    for (const auto& head : heads) head.slice(result).copy_(head.pairs(grad).select(1, S).sum(0));
  };
  row_gradient(needs[12], w.bias_k, dk, g.bias_k);
  row_gradient(needs[13], w.bias_v, dv, g.bias_v);
  return g;
}

}  // namespace

LayerForward forward(const MultiheadInputs& in) {
  check_inputs(in);
  const auto& w = in.weights;
  const auto& x = in.query;
  const int64_t B = x.size(0), L = x.size(1), S = in.key.size(1), K = in.index.size(1);
  const int64_t e = w.q_weight.size(0), d = in.num_heads ? e / in.num_heads : 0;
  const int64_t added = added_rows(w);
  const auto list = make_work_list(in.index, in.count, in.num_heads);
  const int64_t N = list.size();
  // The buffers that backward reads have room for every slot; the pairs fill the first N.
  const auto buffer = [&](int64_t rows) { return at::empty({B * K, rows, d}, x.options()); };
  auto q = buffer(L), k = buffer(S + added), v = buffer(S + added), context = buffer(L);
  const auto heads = chosen(list, in.num_heads, d);
  for (const auto& head : heads) {
    const auto query = rows_of(in.query, list, head.h);
    const auto key = in.key.is_same(in.query) ? query : rows_of(in.key, list, head.h);
    const auto value = in.value.is_same(in.key) ? key : rows_of(in.value, list, head.h);
    project(head, query, w.q_weight, w.q_bias, q);
    project(head, key, w.k_weight, w.k_bias, k);
    project(head, value, w.v_weight, w.v_bias, v);
    if (w.bias_k) {
      head.pairs(k).select(1, S).copy_(head.slice(*w.bias_k));
      head.pairs(v).select(1, S).copy_(head.slice(*w.bias_v));
    }
  }
  if (w.add_zero_attn) {
    k.narrow(0, 0, N).select(1, S + added - 1).zero_();
    v.narrow(0, 0, N).select(1, S + added - 1).zero_();
  }
  const auto packed = [&](const Tensor& t) { return t.narrow(0, 0, N); };
  const PairAttention attention{in.arguments, list, B, in.num_heads, added};
  packed(context).copy_(attention_forward(attention, packed(q), packed(k), packed(v)));

  const auto y =
      combine(list, heads, packed(context) * pair_weight(in.weight, list, x.scalar_type()),
              w.out_proj_weight, w.out_proj_bias, B);
  const auto slots = [&](const Tensor& t) { return t.view({B, K, t.size(1), t.size(2)}); };
  return {y.to(x.scalar_type()),
          slots(q),
          slots(k),
          slots(v),
          slots(context),
          at::zeros({B, K, L}, y.options())};
}

LayerForward forward(const SelfInputs& in) {
  check_inputs(in);
  return forward(as_multihead(in));
}

MultiheadBackward backward(const Tensor& grad_output, const MultiheadInputs& in,
                           const LayerSaved& saved, const Needs<15>& needs) {
  const auto g = layer_backward(grad_output, in, saved, needs);
  const auto& x = in.query;
  const auto of = [&](const Tensor& gradient, const OptionalTensor& input) {
    return result(gradient, input.value_or(x));
  };
  const auto& w = in.weights;
  return {of(g.query, in.query),
          of(g.key, in.key),
          of(g.value, in.value),
          of(g.q_weight, w.q_weight),
          of(g.k_weight, w.k_weight),
          of(g.v_weight, w.v_weight),
          of(g.q_bias, w.q_bias),
          of(g.k_bias, w.k_bias),
          of(g.v_bias, w.v_bias),
          of(g.out_proj_weight, w.out_proj_weight),
          of(g.out_proj_bias, w.out_proj_bias),
          of(g.weight, in.weight),
          of(g.bias_k, w.bias_k),
          of(g.bias_v, w.bias_v),
          of(g.attn_mask, in.arguments.attn_mask)};
}

SelfBackward backward(const Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                      const Needs<7>& needs) {
  const bool x = needs[0], weight = needs[1], bias = needs[2];
  const auto g = layer_backward(grad_output, as_multihead(in), saved,
                                {x, x, x, weight, weight, weight, bias, bias, bias, needs[3],
                                 needs[4], needs[5], false, false, needs[6]});
  const auto of = [&](const Tensor& gradient, const OptionalTensor& input) {
    return result(gradient, input.value_or(in.x));
  };
  return {of(x ? g.query + g.key + g.value : Tensor(), in.x),
          of(weight ? at::cat({g.q_weight, g.k_weight, g.v_weight}) : Tensor(), in.in_proj_weight),
          of(bias ? at::cat({g.q_bias, g.k_bias, g.v_bias}) : Tensor(), in.in_proj_bias),
          of(g.out_proj_weight, in.out_proj_weight),
          of(g.out_proj_bias, in.out_proj_bias),
          of(g.weight, in.weight),
          of(g.attn_mask, in.arguments.attn_mask)};
}

}  // namespace headwise::ops::aten

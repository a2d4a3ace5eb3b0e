// The layer by heads: for each head, one matrix product over the sequences that chose it. Inputs
// are gathered per head, projections lie packed as [N, ., d] in the order of the work list.
#include <ATen/ATen.h>

#include "ops/grouped/grouped.h"

namespace headwise::ops::grouped {
namespace {

using at::Tensor;

int64_t added_rows(const ProjectionWeights& w) { return w.bias_k.has_value() + w.add_zero_attn; }

/// Rows of the sequences that chose head h: x [B, R, D] -> [n, R, D]; all of them, in order, need
/// no copy.
Tensor rows_of(const Tensor& x, const WorkList& list, int64_t h) {
  return list.count(h) == x.size(0) ? x : x.index_select(0, list.batches(h));
}

/// total[b] += part[i] for the sequences b of head h, which are all different.
void add_rows(Tensor& total, const WorkList& list, int64_t h, const Tensor& part) {
  if (list.count(h) == total.size(0)) {
    total.add_(part);
  } else {
    total.index_add_(0, list.batches(h), part.to(total.scalar_type()));
  }
}

struct Head {
  int64_t h, begin, count, d;
  /// Its rows of a weight [E, D] or bias [E].
  Tensor slice(const Tensor& t) const { return t.narrow(0, h * d, d); }
  std::optional<Tensor> slice(const OptionalTensor& t) const {
    return t ? OptionalTensor(slice(*t)) : OptionalTensor();
  }
  /// Its pairs of a packed tensor [N, ., .].
  Tensor pairs(const Tensor& t) const { return t.narrow(0, begin, count); }
};

/// The chosen heads of the list, those that at least one sequence chose.
std::vector<Head> chosen(const WorkList& list, int64_t num_heads, int64_t d) {
  std::vector<Head> heads;
  for (int64_t h = 0; h < num_heads; ++h)
    if (list.count(h)) heads.push_back({h, list.begin(h), list.count(h), d});
  return heads;
}

/// weight [B, H] of every pair, [N, 1, 1].
Tensor pair_weight(const Tensor& weight, const WorkList& list, at::ScalarType type) {
  return weight.index({list.batches(), list.heads()}).to(type).view({-1, 1, 1});
}

MultiheadInputs as_multihead(const SelfInputs& in) {
  const int64_t e = in.out_proj_weight.size(1);
  const auto rows = [&](const Tensor& t, int64_t n) { return t.narrow(0, n * e, e); };
  const auto biases = [&](int64_t n) {
    return in.in_proj_bias ? OptionalTensor(rows(*in.in_proj_bias, n)) : OptionalTensor();
  };
  return {in.x,
          in.x,
          in.x,
          {rows(in.in_proj_weight, 0),
           rows(in.in_proj_weight, 1),
           rows(in.in_proj_weight, 2),
           biases(0),
           biases(1),
           biases(2),
           in.out_proj_weight,
           in.out_proj_bias,
           {},
           {},
           false},
          in.num_heads,
          in.index,
          in.count,
          in.weight,
          in.arguments};
}

/// In the order of the arguments of selected_multihead_attention; undefined where not needed.
struct LayerGradients {
  Tensor query, key, value, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, out_proj_weight,
      out_proj_bias, weight, bias_k, bias_v, attn_mask;
};

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
  const auto zeros = [&](const Tensor& like) {
    return at::zeros(like.sizes(), like.options().dtype(type));
  };
  LayerGradients g;
  if (needs[9])
    g.out_proj_weight = at::zeros(w.out_proj_weight.sizes(), w.out_proj_weight.options());
  if (needs[10]) g.out_proj_bias = grad_output.sum(at::IntArrayRef({0, 1}), false, type);
  const auto scale = pair_weight(in.weight, list, x.scalar_type());   // [N, 1, 1]
  auto grad_context = at::empty(context.sizes(), context.options());  // of weight * context
  for (const auto& head : heads) {
    const auto rows = rows_of(grad_output, list, head.h);  // [n, L, D]
    const auto columns = w.out_proj_weight.narrow(1, head.h * d, d);
    head.pairs(grad_context).copy_(at::matmul(rows, columns));
    if (needs[9]) {
      const auto weighted = head.pairs(context) * head.pairs(scale);
      g.out_proj_weight.narrow(1, head.h * d, d)
          .copy_(at::matmul(rows.reshape({-1, rows.size(2)}).t(), weighted.reshape({-1, d})));
    }
  }
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

  // One of query, key, value: the projection x [B, R, D] -> rows, its weight and bias.
  const auto project = [&](const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor& grad, std::array<bool, 3> need, Tensor& grad_input,
                           Tensor& grad_weight, Tensor& grad_bias) {
    const auto rows = grad.narrow(1, 0, input.size(1)).to(input.scalar_type());  // [N, R, d]
    if (need[0]) grad_input = zeros(input);
    if (need[1]) grad_weight = at::zeros(weight.sizes(), weight.options());
    if (need[2]) grad_bias = at::zeros(bias->sizes(), bias->options());
    for (const auto& head : heads) {
      const auto part = head.pairs(rows);  // [n, R, d]
      if (need[0]) add_rows(grad_input, list, head.h, at::matmul(part, head.slice(weight)));
      if (need[1])
        head.slice(grad_weight)
            .copy_(at::matmul(part.reshape({-1, d}).t(),
                              rows_of(input, list, head.h).reshape({-1, input.size(2)})));
      if (need[2])
        head.slice(grad_bias).copy_(
            head.pairs(grad).narrow(1, 0, input.size(1)).sum(at::IntArrayRef({0, 1})));
    }
  };
  project(in.query, w.q_weight, w.q_bias, dq, {needs[0], needs[3], needs[6]}, g.query, g.q_weight,
          g.q_bias);
  project(in.key, w.k_weight, w.k_bias, dk, {needs[1], needs[4], needs[7]}, g.key, g.k_weight,
          g.k_bias);
  project(in.value, w.v_weight, w.v_bias, dv, {needs[2], needs[5], needs[8]}, g.value, g.v_weight,
          g.v_bias);
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

/// In the dtype of its input, or without elements where it was not needed.
Tensor result(const Tensor& gradient, const Tensor& like) {
  return gradient.defined() ? gradient.to(like.scalar_type()) : at::empty({0}, like.options());
}

}  // namespace

LayerForward forward(const MultiheadInputs& in) {
  check_inputs(in);
  const auto& w = in.weights;
  const auto& x = in.query;
  const int64_t B = x.size(0), L = x.size(1), S = in.key.size(1), K = in.index.size(1);
  const int64_t e = w.q_weight.size(0), d = in.num_heads ? e / in.num_heads : 0;
  const int64_t added = added_rows(w), D = w.out_proj_weight.size(0);
  const auto list = make_work_list(in.index, in.count, in.num_heads);
  const int64_t N = list.size();
  // The buffers that backward reads have room for every slot; the pairs fill the first N.
  const auto buffer = [&](int64_t rows) { return at::empty({B * K, rows, d}, x.options()); };
  auto q = buffer(L), k = buffer(S + added), v = buffer(S + added), context = buffer(L);
  const auto heads = chosen(list, in.num_heads, d);
  for (const auto& head : heads) {
    const auto project = [&](const Tensor& rows, const Tensor& weight, const OptionalTensor& bias,
                             Tensor& to) {
      head.pairs(to)
          .narrow(1, 0, rows.size(1))
          .copy_(at::linear(rows, head.slice(weight), head.slice(bias)));
    };
    const auto query = rows_of(in.query, list, head.h);
    const auto key = in.key.is_same(in.query) ? query : rows_of(in.key, list, head.h);
    const auto value = in.value.is_same(in.key) ? key : rows_of(in.value, list, head.h);
    project(query, w.q_weight, w.q_bias, q);
    project(key, w.k_weight, w.k_bias, k);
    project(value, w.v_weight, w.v_bias, v);
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

  // Summed over heads in the accumulation type: a head's share is rounded once, the sum is not.
  const auto type = lse_type(x.scalar_type());
  auto y = at::zeros({B, L, D}, x.options().dtype(type));
  if (w.out_proj_bias) y.add_(*w.out_proj_bias);
  const auto weighted = packed(context) * pair_weight(in.weight, list, x.scalar_type());
  for (const auto& head : heads)
    add_rows(y, list, head.h,
             at::matmul(head.pairs(weighted), w.out_proj_weight.narrow(1, head.h * d, d).t()));
  const auto slots = [&](const Tensor& t) { return t.view({B, K, t.size(1), t.size(2)}); };
  return {y.to(x.scalar_type()),
          slots(q),
          slots(k),
          slots(v),
          slots(context),
          at::zeros({B, K, L}, x.options().dtype(type))};
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

}  // namespace headwise::ops::grouped

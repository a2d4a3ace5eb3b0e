#include "ops/aten/projection.h"

#include <ATen/ATen.h>

namespace headwise::ops::aten {
namespace {

using at::Tensor;

/// total[b] += part[i] for the sequences b of head h, which are all different.
void add_rows(Tensor& total, const WorkList& list, int64_t h, const Tensor& part) {
  if (list.count(h) == total.size(0)) {
    total.add_(part);
  } else {
    total.index_add_(0, list.batches(h), part.to(total.scalar_type()));
  }
}

}  // namespace

Tensor result(const Tensor& gradient, const Tensor& like) {
  return gradient.defined() ? gradient.to(like.scalar_type()) : at::empty({0}, like.options());
}

std::vector<Head> chosen(const WorkList& list, int64_t num_heads, int64_t d) {
  std::vector<Head> heads;
  for (int64_t h = 0; h < num_heads; ++h)
    if (list.count(h)) heads.push_back({h, list.begin(h), list.count(h), d});
  return heads;
}

// All sequences, in order, need no copy.
Tensor rows_of(const Tensor& x, const WorkList& list, int64_t h) {
  return list.count(h) == x.size(0) ? x : x.index_select(0, list.batches(h));
}

Tensor pair_weight(const Tensor& weight, const WorkList& list, at::ScalarType type) {
  return weight.index({list.batches(), list.heads()}).to(type).view({-1, 1, 1});
}

void project(const Head& head, const Tensor& rows, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& packed) {
  head.pairs(packed)
      .narrow(1, 0, rows.size(1))
      .copy_(at::linear(rows, head.slice(weight), head.slice(bias)));
}

ProjectGradients project_backward(const WorkList& list, const std::vector<Head>& heads,
                                  const Tensor& x, const Tensor& weight, const Tensor& grad,
                                  std::array<bool, 3> needs) {
  const auto rows = grad.narrow(1, 0, x.size(1)).to(x.scalar_type());  // [N, R, d]
  ProjectGradients g;
  if (needs[0]) g.x = at::zeros(x.sizes(), x.options().dtype(lse_type(x.scalar_type())));
  if (needs[1]) g.weight = at::zeros(weight.sizes(), weight.options());
  if (needs[2]) g.bias = at::zeros({weight.size(0)}, weight.options());
  for (const auto& head : heads) {
    const auto part = head.pairs(rows);  // [n, R, d]
    if (needs[0]) add_rows(g.x, list, head.h, at::matmul(part, head.slice(weight)));
    if (needs[1])
      head.slice(g.weight).copy_(
          at::matmul(part.flatten(0, 1).t(), rows_of(x, list, head.h).flatten(0, 1)));
    if (needs[2])
      head.slice(g.bias).copy_(
          head.pairs(grad).narrow(1, 0, x.size(1)).sum(at::IntArrayRef({0, 1})));
  }
  return g;
}

Tensor combine(const WorkList& list, const std::vector<Head>& heads, const Tensor& packed,
               const Tensor& weight, const OptionalTensor& bias, int64_t batch) {
  auto y = at::zeros({batch, packed.size(1), weight.size(0)},
                     packed.options().dtype(lse_type(packed.scalar_type())));
  if (bias) y.add_(*bias);
  for (const auto& head : heads)
    add_rows(y, list, head.h,
             at::matmul(head.pairs(packed), weight.narrow(1, head.h * head.d, head.d).t()));
  return y;
}

CombineGradients combine_backward(const WorkList& list, const std::vector<Head>& heads,
                                  const Tensor& grad_output, const Tensor& scaled,
                                  const Tensor& weight, bool needs_weight) {
  CombineGradients g{at::empty(scaled.sizes(), scaled.options()), {}};
  if (needs_weight) g.weight = at::zeros(weight.sizes(), weight.options());
  for (const auto& head : heads) {
    const auto rows = rows_of(grad_output, list, head.h);  // [n, L, Dout]
    const auto columns = [&](const Tensor& t) { return t.narrow(1, head.h * head.d, head.d); };
    head.pairs(g.packed).copy_(at::matmul(rows, columns(weight)));
    if (needs_weight)
      columns(g.weight).copy_(at::matmul(rows.flatten(0, 1).t(), head.pairs(scaled).flatten(0, 1)));
  }
  return g;
}

Tensor forward(const ProjectionInputs& in) {
  check_inputs(in);
  const int64_t d = head_width(in);
  const auto list = make_work_list(in.index, in.count, in.num_heads);
  auto packed = at::empty({list.size(), in.x.size(1), d}, in.x.options());
  for (const auto& head : chosen(list, in.num_heads, d))
    project(head, rows_of(in.x, list, head.h), in.weight, in.bias, packed);
  return scatter_heads(packed, list, in.x.size(0), in.num_heads);
}

ProjectionBackward backward(const Tensor& grad_output, const ProjectionInputs& in,
                            const Needs<3>& needs) {
  const auto list = make_work_list(in.index, in.count, in.num_heads);
  const auto g = project_backward(list, chosen(list, in.num_heads, head_width(in)), in.x, in.weight,
                                  gather_heads(grad_output, list), needs);
  return {result(g.x, in.x), result(g.weight, in.weight), result(g.bias, in.weight)};
}

Tensor forward(const OutputInputs& in) {
  check_inputs(in);
  const auto& heads = in.heads;
  const auto list = make_work_list(in.index, in.count, heads.size(1));
  auto packed = gather_heads(heads, list);  // [N, L, d]
  if (in.head_weight) packed = packed * pair_weight(*in.head_weight, list, packed.scalar_type());
  return combine(list, chosen(list, heads.size(1), heads.size(3)), packed, in.weight, in.bias,
                 heads.size(0))
      .to(heads.scalar_type());
}

OutputBackward backward(const Tensor& grad_output, const OutputInputs& in, const Needs<4>& needs) {
  const auto& heads = in.heads;
  const auto type = lse_type(heads.scalar_type());
  const auto list = make_work_list(in.index, in.count, heads.size(1));
  const auto packed = gather_heads(heads, list);  // [N, L, d]
  auto scaled = packed;
  if (in.head_weight) scaled = packed * pair_weight(*in.head_weight, list, packed.scalar_type());
  auto g = combine_backward(list, chosen(list, heads.size(1), heads.size(3)), grad_output, scaled,
                            in.weight, needs[1]);
  Tensor grad_heads, grad_bias, grad_head_weight;
  if (in.head_weight && needs[3]) {
    const auto dots = (g.packed.to(type) * packed.to(type)).sum(at::IntArrayRef({1, 2}));  // [N]
    grad_head_weight = at::zeros(in.head_weight->sizes(), in.head_weight->options());
    grad_head_weight.index_put_({list.batches(), list.heads()},
                                dots.to(in.head_weight->scalar_type()));
  }
  if (needs[0]) {
    if (in.head_weight) g.packed.mul_(pair_weight(*in.head_weight, list, packed.scalar_type()));
    grad_heads = scatter_heads(g.packed, list, heads.size(0), heads.size(1));
  }
  if (needs[2]) grad_bias = grad_output.sum(at::IntArrayRef({0, 1}), false, type);
  return {result(grad_heads, heads), result(g.weight, in.weight), result(grad_bias, in.weight),
          result(grad_head_weight, in.head_weight.value_or(heads))};
}

}  // namespace headwise::ops::aten

// The layer on the device: projections of the chosen heads into packed buffers [B, K, R, d] whose
// place n belongs to the n-th chosen head of a sequence, attention over the chosen pairs, and an
// output projection that adds up the chosen heads of a row in registers.
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <cmath>

#include "headwise/backends.h"
#include "ops/cuda/arguments.h"
#include "ops/cuda/flash.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/selected.h"
#include "ops/multihead_form.h"

namespace headwise::ops::device {
namespace {

using at::Tensor;
using kernels::cuda::CombineArguments;
using kernels::cuda::OuterArguments;
using kernels::cuda::ProjectArguments;
using kernels::cuda::ProjectPart;

/// The layer in the general form. If query, key and value are one input, `joint` is the weight of
/// all three, [3E, D].
struct Layer {
  const MultiheadInputs& in;
  const Tensor* joint;  ///< or null
  Tensor query, key, value, weight;
  int64_t B, L, S, K, H, d, added;
  at::ScalarType type, accumulator;
  bool flash;  ///< attention by flash.h
  Selected selected;
  Masks masks;

  Layer(const MultiheadInputs& inputs, const Tensor* joint_weight)
      : in(inputs),
        joint(joint_weight),
        query(dense_rows(in.query)),
        key(in.key.is_same(in.query) ? query : dense_rows(in.key)),
        value(in.value.is_same(in.query) ? query : dense_rows(in.value)),
        weight(in.weight.to(lse_type(query.scalar_type())).contiguous()),
        B(query.size(0)),
        L(query.size(1)),
        S(key.size(1)),
        K(in.index.size(1)),
        H(in.num_heads),
        d(H ? in.weights.q_weight.size(0) / H : 0),
        added(added_rows(in.weights)),
        type(query.scalar_type()),
        accumulator(lse_type(type)),
        flash(L == S && added == 0 && !in.arguments.key_padding_mask && !in.arguments.attn_mask &&
              in.arguments.dropout_p == 0 && flash_takes(type, B * K, L, d) &&
              cuda_routes().attention == CudaAttention::flash),
        selected(select(in.index, in.count, H, flash ? L : 0)),
        masks(in.arguments, type, query.device(), B, H, L, S) {}

  Tensor buffer(int64_t rows_) const { return at::empty({B, K, rows_, d}, query.options()); }
  at::TensorOptions sums() const { return query.options().dtype(accumulator); }

  double scale() const { return in.arguments.scale.value_or(d ? 1 / std::sqrt(double(d)) : 1.0); }
  FlashShape flash_shape() const {
    return {selected.begins, selected.begins, L, L, in.arguments.is_causal, scale()};
  }
  /// A buffer as flash.h takes it.
  Tensor flash_rows(const Tensor& t) const { return t.view({B * K * L, 1, d}); }

  /// The arguments of attention over buffers q, k, v.
  PairAttentionArguments attention(const Tensor& q, const Tensor& k, const Tensor& v) const {
    PairAttentionArguments a{};
    masks.apply(a);
    a.type = element_of(type);
    a.chosen = selected.chosen;
    a.packed = true, a.group = 1;
    a.queries = L, a.keys = S + added, a.added = added;
    a.width = a.value_width = d;
    a.scale = scale();
    a.q = packed_units(q), a.k = packed_units(k), a.v = packed_units(v);
    a.vectors = aligned(q) && aligned(k) && aligned(v);
    return a;
  }
};

/// Adds to `a` the projection of `input` [B, R, D] by `weight` [E, D] into `packed`.
void add_part(ProjectArguments& a, const Tensor& input, const Tensor& weight, const Tensor& bias,
              Tensor& packed, const int32_t* limit) {
  ProjectPart part{};
  part.input = rows(input);
  part.rows = input.size(1), part.depth = input.size(2);
  part.weight = weight.const_data_ptr(), part.weight_stride = weight.stride(0);
  part.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  part.packed = packed.mutable_data_ptr(), part.packed_rows = packed.size(2);
  part.limit = limit;
  part.vectors = aligned(input) && aligned(weight);
  a.part[a.parts++] = part;
}

Tensor defined_or_empty(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }

/// Row `row` of the packed keys or values: the head's part of `values` [E], or zeros.
void fill_row(const Layer& l, Tensor& packed, int64_t row, const OptionalTensor& values) {
  auto to = packed.select(2, row);  // [B, K, d]
  if (!values) {
    to.zero_();
    return;
  }
  const auto heads = l.selected.packed_head.clamp_min(0);  // [B K]
  to.copy_(values->reshape({l.H, l.d}).index_select(0, heads).view({l.B, l.K, l.d}));
}

/// sum over parts of the packed rows times the rows of their heads in `weight` [C, parts * E].
Tensor combine(const Layer& l, const std::vector<const Tensor*>& packed,
               const std::vector<const int32_t*>& limits, const Tensor& weight, int64_t rows_,
               const Tensor* factor, const Tensor& bias) {
  auto output = at::empty({l.B, rows_, weight.size(0)}, l.query.options());
  CombineArguments a{};
  a.type = element_of(l.type);
  a.chosen = l.selected.chosen;
  a.width = l.d, a.rows = rows_, a.columns = weight.size(0);
  a.warpgroups = cuda_routes().products == CudaProducts::warpgroups;
  // The columns of head h begin at h d: in a weight whose rows are aligned, the heads need not be.
  a.vectors = aligned(weight) && l.d * static_cast<int64_t>(weight.element_size()) % 16 == 0;
  for (size_t p = 0; p < packed.size(); ++p) {
    a.part[a.parts++] = {packed[p]->const_data_ptr(), packed[p]->size(2), limits[p]};
    a.vectors = a.vectors && aligned(*packed[p]);
  }
  a.weight = weight.const_data_ptr(), a.weight_stride = weight.stride(0);
  a.factor = factor ? factor->const_data_ptr() : nullptr;
  a.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  a.output = output.mutable_data_ptr();
  check_launch(kernels::cuda::combine(a, current_stream()));
  return output;
}

/// Gradient of a weight [parts * E, C], and of a bias [parts * E] if wanted.
struct WeightGradient {
  Tensor weight, bias;
};
struct OuterInput {
  const Tensor *packed, *input;
  const int32_t* limit;
};
WeightGradient outer(const Layer& l, const std::vector<OuterInput>& parts, const Tensor* factor,
                     bool wants_bias) {
  OuterArguments a{};
  a.type = element_of(l.type);
  a.chosen = l.selected.chosen;
  a.width = l.d, a.columns = parts[0].input->size(2);
  a.vectors = true;
  int64_t longest = 0;
  for (const auto& p : parts) {
    a.part[a.parts++] = {p.packed->const_data_ptr(), p.packed->size(2), rows(*p.input),
                         p.input->size(1), p.limit};
    a.vectors = a.vectors && aligned(*p.packed) && aligned(*p.input);
    longest = std::max(longest, p.input->size(1));
  }
  // Enough blocks to fill a device; each split holds at least 128 rows of a sequence.
  const int64_t tiles =
      a.parts * l.H * kernels::cuda::tiles_of(l.d, 64) * kernels::cuda::tiles_of(a.columns, 128);
  constexpr int64_t kBlocks = 512, kRows = 128;
  a.splits = static_cast<int>(
      std::clamp<int64_t>(kBlocks / std::max<int64_t>(tiles, 1), 1,
                          std::max<int64_t>(1, std::min<int64_t>(longest / kRows, 16))));
  a.rounded = a.splits == 1;
  const auto stored = a.rounded ? l.query.options() : l.sums();
  auto partial = at::empty({a.splits, a.parts * l.H * l.d, a.columns}, stored);
  auto sums = wants_bias ? at::empty({a.splits, a.parts * l.H * l.d}, stored) : Tensor();
  a.factor = factor ? factor->const_data_ptr() : nullptr;
  a.partial = partial.mutable_data_ptr();
  // Sums are made by the blocks of the first columns; an input without columns has none.
  if (wants_bias && a.columns == 0) sums.zero_();
  a.sums = wants_bias ? sums.mutable_data_ptr() : nullptr;
  check_launch(kernels::cuda::outer(a, current_stream()));
  const auto total = [&](const Tensor& t) {
    return a.rounded ? t.squeeze(0) : t.sum(0).to(l.type);
  };
  return {total(partial), wants_bias ? total(sums) : Tensor()};
}

/// Without `keep`, what only a backward reads is not held while the output is made, nor returned.
LayerForward layer_forward(const Layer& l, bool keep) {
  const auto& in = l.in;
  const auto& w = in.weights;
  auto q = l.buffer(l.L), k = l.buffer(l.S + l.added), v = l.buffer(l.S + l.added);
  const auto q_weight = dense_rows(w.q_weight), k_weight = dense_rows(w.k_weight),
             v_weight = dense_rows(w.v_weight);
  const auto q_bias = defined_or_empty(w.q_bias), k_bias = defined_or_empty(w.k_bias),
             v_bias = defined_or_empty(w.v_bias);
  ProjectArguments p{};
  p.type = element_of(l.type), p.chosen = l.selected.chosen, p.width = l.d;
  p.warpgroups = cuda_routes().products == CudaProducts::warpgroups;
  add_part(p, l.query, q_weight, q_bias, q, nullptr);
  add_part(p, l.key, k_weight, k_bias, k, l.masks.limits());
  add_part(p, l.value, v_weight, v_bias, v, l.masks.limits());
  check_launch(kernels::cuda::project(p, current_stream()));
  if (w.bias_k) {
    fill_row(l, k, l.S, w.bias_k);
    fill_row(l, v, l.S, w.bias_v);
  }
  if (w.add_zero_attn) {
    fill_row(l, k, l.S + l.added - 1, {});
    fill_row(l, v, l.S + l.added - 1, {});
  }
  Tensor context, lse;
  if (l.flash) {
    std::tie(context, lse) = flash_forward(l.flash_rows(q), l.flash_rows(k), l.flash_rows(v),
                                           l.flash_shape(), std::nullopt);
    context = context.view(q.sizes()), lse = lse.view({l.B, l.K, l.L});
  } else {
    context = l.buffer(l.L), lse = at::empty({l.B, l.K, l.L}, l.sums());
    auto a = l.attention(q, k, v);
    a.context = packed_units(context);
    a.lse = lse.mutable_data_ptr();
    check_launch(kernels::cuda::attention_forward(a, current_stream()));
  }
  if (!keep) q = k = v = lse = Tensor();
  const auto out_weight = dense_rows(w.out_proj_weight),
             out_bias = defined_or_empty(w.out_proj_bias);
  auto y = combine(l, {&context}, {nullptr}, out_weight, l.L, &l.weight, out_bias);
  return {y, q, k, v, context, lse};
}

/// Gradient of an added row [E] from that of the keys or values [B, K, R, d].
Tensor row_gradient(const Layer& l, const Tensor& grad) {
  const auto& heads = l.selected.packed_head;  // [B K]
  const auto rows_ = grad.select(2, l.S).reshape({-1, l.d}).to(l.accumulator);
  const auto chosen = rows_.masked_fill(heads.lt(0).unsqueeze(1), 0);
  return at::zeros({l.H, l.d}, l.sums())
      .index_add_(0, heads.clamp_min(0), chosen)
      .view({-1})
      .to(l.type);
}

/// With a joint weight, `query`, `q_weight` and `q_bias` are the gradients of x and of the joint
/// ones.
LayerGradients layer_backward(const Layer& l, const Tensor& grad_output, const LayerSaved& saved,
                              const Needs<15>& needs) {
  const auto& w = l.in.weights;
  LayerGradients g;
  const auto grad = dense_rows(grad_output);  // [B, L, D]
  if (needs[10])
    g.out_proj_bias = grad.sum(at::IntArrayRef({0, 1}), false, l.accumulator).to(l.type);
  if (needs[9])
    g.out_proj_weight =
        outer(l, {{&saved.context, &grad, nullptr}}, &l.weight, false).weight.t().contiguous();
  bool inner = needs[11] || needs[14];
  for (int i : {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13}) inner |= needs[i];
  if (!inner) return g;

  auto grad_context = l.buffer(l.L);                           // of weight * context
  const auto out_weight = w.out_proj_weight.t().contiguous();  // [E, D]
  ProjectArguments p{};
  p.type = element_of(l.type), p.chosen = l.selected.chosen, p.width = l.d;
  p.warpgroups = cuda_routes().products == CudaProducts::warpgroups;
  add_part(p, grad, out_weight, {}, grad_context, nullptr);
  check_launch(kernels::cuda::project(p, current_stream()));

  auto delta = at::empty({l.B, l.K, l.L}, l.sums());
  auto grad_weight = needs[11] ? at::zeros({l.B, l.H}, l.sums()) : Tensor();
  auto a = l.attention(saved.q, saved.k, saved.v);
  a.vectors = a.vectors && aligned(grad_context);
  a.weight = l.weight.const_data_ptr();
  a.grad_context = packed_units(grad_context), a.context = packed_units(saved.context);
  a.context_vectors = aligned(grad_context) && aligned(saved.context);
  check_launch(kernels::cuda::attention_delta(a, delta.mutable_data_ptr(),
                                              needs[11] ? grad_weight.mutable_data_ptr() : nullptr,
                                              l.flash, current_stream()));
  if (needs[11]) g.weight = grad_weight.to(l.in.weight.scalar_type());
  Tensor grad_mask;
  if (needs[14]) {
    grad_mask = at::zeros({l.B, l.H, l.L, l.S}, l.sums());
    a.grad_mask = grad_mask.mutable_data_ptr();
  }
  Tensor dq, dk, dv;
  if (l.flash) {
    std::tie(dq, dk, dv) = flash_backward(
        l.flash_rows(grad_context), l.flash_rows(saved.q), l.flash_rows(saved.k),
        l.flash_rows(saved.v), l.flash_rows(saved.context), saved.lse.view({-1}), l.flash_shape());
    for (auto* t : {&dq, &dk, &dv}) *t = t->view(saved.q.sizes());
  } else {
    dq = l.buffer(l.L), dk = l.buffer(l.S + l.added), dv = l.buffer(l.S + l.added);
    a.lse = const_cast<void*>(saved.lse.const_data_ptr()), a.delta = delta.const_data_ptr();
    a.grad_q = packed_units(dq), a.grad_k = packed_units(dk), a.grad_v = packed_units(dv);
    check_launch(kernels::cuda::attention_backward(a, current_stream()));
  }
  if (needs[14]) {
    const auto& mask = *l.in.arguments.attn_mask;
    g.attn_mask = at::sum_to(grad_mask, mask.sizes()).to(mask.scalar_type());
  }
  grad_context = delta = Tensor();  // room for the gradients that follow
  if (needs[12]) g.bias_k = row_gradient(l, dk);
  if (needs[13]) g.bias_v = row_gradient(l, dv);

  const int32_t* const limits = l.masks.limits();
  if (l.joint) {
    if (needs[0])
      g.query = combine(l, {&dq, &dk, &dv}, {nullptr, limits, limits}, l.joint->t().contiguous(),
                        l.L, nullptr, {});
    if (needs[3] || needs[6]) {
      auto both =
          outer(l, {{&dq, &l.query, nullptr}, {&dk, &l.query, limits}, {&dv, &l.query, limits}},
                nullptr, needs[6]);
      g.q_weight = both.weight, g.q_bias = both.bias;
    }
    return g;
  }
  const auto project = [&](const Tensor& input, const Tensor& weight, const Tensor& packed,
                           const int32_t* limit, std::array<bool, 3> need, Tensor& grad_input,
                           Tensor& grad_weights, Tensor& grad_bias) {
    if (need[0])
      grad_input =
          combine(l, {&packed}, {limit}, weight.t().contiguous(), input.size(1), nullptr, {});
    if (need[1] || need[2]) {
      auto both = outer(l, {{&packed, &input, limit}}, nullptr, need[2]);
      grad_weights = both.weight, grad_bias = both.bias;
    }
  };
  project(l.query, w.q_weight, dq, nullptr, {needs[0], needs[3], needs[6]}, g.query, g.q_weight,
          g.q_bias);
  project(l.key, w.k_weight, dk, limits, {needs[1], needs[4], needs[7]}, g.key, g.k_weight,
          g.k_bias);
  project(l.value, w.v_weight, dv, limits, {needs[2], needs[5], needs[8]}, g.value, g.v_weight,
          g.v_bias);
  return g;
}

}  // namespace

std::string refusal(const MultiheadInputs& in) {
  const int64_t d = in.num_heads ? in.weights.q_weight.size(0) / in.num_heads : 0;
  if (d > kernels::cuda::kWidestHead)
    return c10::str("heads of ", d, " columns: the kernels take at most ",
                    kernels::cuda::kWidestHead);
  return "";
}
std::string refusal(const SelfInputs& in) { return refusal(as_multihead(in)); }

LayerForward forward(const MultiheadInputs& in, bool keep) {
  check_inputs(in);
  const DeviceGuard guard(in.query.device());
  return layer_forward(Layer(in, nullptr), keep);
}

LayerForward forward(const SelfInputs& in, bool keep) {
  check_inputs(in);
  const DeviceGuard guard(in.x.device());
  const auto inputs = as_multihead(in);
  return layer_forward(Layer(inputs, &in.in_proj_weight), keep);
}

MultiheadBackward backward(const Tensor& grad_output, const MultiheadInputs& in,
                           const LayerSaved& saved, const Needs<15>& needs) {
  const DeviceGuard guard(in.query.device());
  const auto g = layer_backward(Layer(in, nullptr), grad_output, saved, needs);
  const auto of = [&](const Tensor& gradient, bool needed) {
    return needed ? gradient : at::empty({0}, in.query.options());
  };
  return {of(g.query, needs[0]),          of(g.key, needs[1]),
          of(g.value, needs[2]),          of(g.q_weight, needs[3]),
          of(g.k_weight, needs[4]),       of(g.v_weight, needs[5]),
          of(g.q_bias, needs[6]),         of(g.k_bias, needs[7]),
          of(g.v_bias, needs[8]),         of(g.out_proj_weight, needs[9]),
          of(g.out_proj_bias, needs[10]), of(g.weight, needs[11]),
          of(g.bias_k, needs[12]),        of(g.bias_v, needs[13]),
          of(g.attn_mask, needs[14])};
}

SelfBackward backward(const Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                      const Needs<7>& needs) {
  const DeviceGuard guard(in.x.device());
  const auto inputs = as_multihead(in);
  Needs<15> inner{};
  inner[0] = needs[0], inner[3] = needs[1], inner[6] = needs[2];
  inner[9] = needs[3], inner[10] = needs[4], inner[11] = needs[5], inner[14] = needs[6];
  const auto g = layer_backward(Layer(inputs, &in.in_proj_weight), grad_output, saved, inner);
  const auto of = [&](const Tensor& gradient, bool needed) {
    return needed ? gradient : at::empty({0}, in.x.options());
  };
  return {of(g.query, needs[0]),           of(g.q_weight, needs[1]),      of(g.q_bias, needs[2]),
          of(g.out_proj_weight, needs[3]), of(g.out_proj_bias, needs[4]), of(g.weight, needs[5]),
          of(g.attn_mask, needs[6])};
}

}  // namespace headwise::ops::device

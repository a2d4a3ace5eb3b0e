// The tensors in the structs of inputs: those that autocast casts, those that autograd saves, and
// those that have a gradient.
#pragma once

#include <array>

#include "ops/attention_ops.h"
#include "ops/projection.h"
#include "ops/routed.h"

namespace headwise::ops {

/// MultiheadInputs and RoutedInputs: query, key, value and the weights of each.
template <typename Inputs>
concept GeneralInputs = requires(Inputs in) { in.weights; };

// Visits the inputs of the matrix products; f takes at::Tensor& or OptionalTensor&.
template <typename F>
void visit_factors(SelfInputs& in, const F& f) {
  f(in.x), f(in.in_proj_weight), f(in.in_proj_bias), f(in.out_proj_weight), f(in.out_proj_bias);
}
template <GeneralInputs Inputs, typename F>
void visit_factors(Inputs& in, const F& f) {
  auto& w = in.weights;
  f(in.query), f(in.key), f(in.value), f(w.q_weight), f(w.k_weight), f(w.v_weight);
  f(w.q_bias), f(w.k_bias), f(w.v_bias), f(w.out_proj_weight), f(w.out_proj_bias);
  f(w.bias_k), f(w.bias_v);
}
template <typename F>
void visit_factors(CoreInputs& in, const F& f) {
  f(in.q), f(in.k), f(in.v);
}
template <typename F>
void visit_factors(ProjectionInputs& in, const F& f) {
  f(in.x), f(in.weight), f(in.bias);
}
template <typename F>
void visit_factors(OutputInputs& in, const F& f) {
  f(in.heads), f(in.weight), f(in.bias);
}

/// Visits every tensor of an attention operator's inputs, in one fixed order.
template <typename Inputs, typename F>
void visit(Inputs& in, const F& f) {
  visit_factors(in, f);
  if constexpr (requires { in.chosen; })
    f(in.chosen);
  else
    f(in.index), f(in.count);
  f(in.weight);
  f(in.arguments.key_padding_mask), f(in.arguments.attn_mask), f(in.arguments.dropout_seed);
}

// The inputs that gradients are computed for, in the order in which the backward operators return
// them; none in place of a mask that is not floating.
inline OptionalTensor differentiable(const AttentionArguments& arguments) {
  const auto& mask = arguments.attn_mask;
  return mask && mask->is_floating_point() ? mask : OptionalTensor();
}
inline std::array<OptionalTensor, 7> differentiable(const SelfInputs& in) {
  return {
      in.x,      in.in_proj_weight,           in.in_proj_bias, in.out_proj_weight, in.out_proj_bias,
      in.weight, differentiable(in.arguments)};
}
template <GeneralInputs Inputs>
std::array<OptionalTensor, 15> differentiable(const Inputs& in) {
  const auto& w = in.weights;
  return {in.query,        in.key,    in.value, w.q_weight, w.k_weight,
          w.v_weight,      w.q_bias,  w.k_bias, w.v_bias,   w.out_proj_weight,
          w.out_proj_bias, in.weight, w.bias_k, w.bias_v,   differentiable(in.arguments)};
}
inline std::array<OptionalTensor, 5> differentiable(const CoreInputs& in) {
  return {in.q, in.k, in.v, in.weight, differentiable(in.arguments)};
}

}  // namespace headwise::ops

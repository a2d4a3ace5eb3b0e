// A route: a way to run the attention operators, as a struct of static functions `forward` and
// `backward` over the structs of inputs. Here are the functions that are registered for it.
#pragma once

#include <initializer_list>
#include <utility>

#include "ops/backward_checks.h"
#include "ops/projection.h"

namespace headwise::ops {

/// `needs` without the gradients of optional arguments that were not given: {position, given}.
template <size_t N>
Needs<N> of_given(Needs<N> needs, std::initializer_list<std::pair<int, bool>> optional) {
  for (const auto& [position, given] : optional) needs[position] = needs[position] && given;
  return needs;
}

template <typename Route>
struct Registered {
  static LayerForward self_forward(HEADWISE_SELF_PARAMETERS) {
    return Route::forward(HEADWISE_SELF_INPUTS);
  }
  static LayerForward multihead_forward(HEADWISE_MULTIHEAD_PARAMETERS) {
    return Route::forward(HEADWISE_MULTIHEAD_INPUTS);
  }
  static CoreForward core_forward(HEADWISE_CORE_PARAMETERS) {
    return Route::forward(HEADWISE_CORE_INPUTS);
  }
  static SelfBackward self_backward(const at::Tensor& grad_output, HEADWISE_SELF_PARAMETERS,
                                    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const at::Tensor& context, const at::Tensor& lse,
                                    std::array<bool, 7> needs) {
    const auto in = HEADWISE_SELF_INPUTS;
    const LayerSaved saved{q, k, v, context, lse};
    check_backward(grad_output, in, saved);
    return Route::backward(grad_output, in, saved,
                           of_given(needs, {{2, in_proj_bias.has_value()},
                                            {4, out_proj_bias.has_value()},
                                            {6, attn_mask.has_value()}}));
  }
  static MultiheadBackward multihead_backward(const at::Tensor& grad_output,
                                              HEADWISE_MULTIHEAD_PARAMETERS, const at::Tensor& q,
                                              const at::Tensor& k, const at::Tensor& v,
                                              const at::Tensor& context, const at::Tensor& lse,
                                              std::array<bool, 15> needs) {
    const auto in = HEADWISE_MULTIHEAD_INPUTS;
    const LayerSaved saved{q, k, v, context, lse};
    check_backward(grad_output, in, saved);
    return Route::backward(grad_output, in, saved,
                           of_given(needs, {{6, q_bias.has_value()},
                                            {7, k_bias.has_value()},
                                            {8, v_bias.has_value()},
                                            {10, out_proj_bias.has_value()},
                                            {12, bias_k.has_value()},
                                            {13, bias_v.has_value()},
                                            {14, attn_mask.has_value()}}));
  }
  static CoreBackward core_backward(const at::Tensor& grad_output, HEADWISE_CORE_PARAMETERS,
                                    const at::Tensor& output, const at::Tensor& context,
                                    const at::Tensor& lse, std::array<bool, 5> needs) {
    const auto in = HEADWISE_CORE_INPUTS;
    check_backward(grad_output, in, output, context, lse);
    return Route::backward(grad_output, in, output, context, lse,
                           of_given(needs, {{3, weight.has_value()}, {4, attn_mask.has_value()}}));
  }
  static at::Tensor projection(HEADWISE_PROJECTION_PARAMETERS) {
    return Route::forward(HEADWISE_PROJECTION_INPUTS);
  }
  static ProjectionBackward projection_backward(HEADWISE_PROJECTION_BACKWARD_PARAMETERS) {
    const ProjectionInputs in{x, weight, {}, num_heads, index, count};
    check_backward(grad_output, in);
    return Route::backward(grad_output, in, needs);
  }
  static at::Tensor output_projection(HEADWISE_OUTPUT_PARAMETERS) {
    return Route::forward(HEADWISE_OUTPUT_INPUTS);
  }
  static OutputBackward output_projection_backward(HEADWISE_OUTPUT_BACKWARD_PARAMETERS) {
    const OutputInputs in{heads, weight, {}, index, count, head_weight};
    check_backward(grad_output, in);
    return Route::backward(grad_output, in, needs);
  }
};

}  // namespace headwise::ops

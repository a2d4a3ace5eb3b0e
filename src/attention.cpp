#include "headwise/attention.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/attention_ops.h"
#include "ops/projection.h"
#include "ops/routed.h"

namespace headwise {
namespace {

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

namespace ops {

using at::Tensor;

#define HEADWISE_UNPACK(a) \
  a.key_padding_mask, a.attn_mask, a.is_causal, a.dropout_p, a.dropout_seed, a.scale
#define HEADWISE_UNPACK_SELF(in)                                                                \
  in.x, in.in_proj_weight, in.in_proj_bias, in.out_proj_weight, in.out_proj_bias, in.num_heads, \
      in.index, in.count, in.weight, HEADWISE_UNPACK(in.arguments)
#define HEADWISE_UNPACK_GENERAL(in)                                                          \
  in.query, in.key, in.value, in.weights.q_weight, in.weights.k_weight, in.weights.v_weight, \
      in.weights.q_bias, in.weights.k_bias, in.weights.v_bias, in.weights.out_proj_weight,   \
      in.weights.out_proj_bias, in.num_heads
#define HEADWISE_UNPACK_ADDED(in) \
  in.weights.bias_k, in.weights.bias_v, in.weights.add_zero_attn, HEADWISE_UNPACK(in.arguments)
#define HEADWISE_UNPACK_MULTIHEAD(in) \
  HEADWISE_UNPACK_GENERAL(in), in.index, in.count, in.weight, HEADWISE_UNPACK_ADDED(in)
#define HEADWISE_UNPACK_ROUTED(in) \
  HEADWISE_UNPACK_GENERAL(in), in.chosen, in.weight, HEADWISE_UNPACK_ADDED(in)
#define HEADWISE_UNPACK_CORE(in) \
  in.q, in.k, in.v, in.index, in.count, in.weight, HEADWISE_UNPACK(in.arguments)

Tensor call(const SelfInputs& in) {
  static auto op = find<Tensor(HEADWISE_SELF_PARAMETERS)>("headwise::selected_self_attention");
  return op.call(HEADWISE_UNPACK_SELF(in));
}
Tensor call(const MultiheadInputs& in) {
  static auto op =
      find<Tensor(HEADWISE_MULTIHEAD_PARAMETERS)>("headwise::selected_multihead_attention");
  return op.call(HEADWISE_UNPACK_MULTIHEAD(in));
}
Tensor call(const CoreInputs& in) {
  static auto op = find<Tensor(HEADWISE_CORE_PARAMETERS)>("headwise::selected_attention");
  return op.call(HEADWISE_UNPACK_CORE(in));
}

LayerForward call_forward(const SelfInputs& in) {
  static auto op =
      find<LayerForward(HEADWISE_SELF_PARAMETERS)>("headwise::_selected_self_attention_forward");
  return op.call(HEADWISE_UNPACK_SELF(in));
}
LayerForward call_forward(const MultiheadInputs& in) {
  static auto op = find<LayerForward(HEADWISE_MULTIHEAD_PARAMETERS)>(
      "headwise::_selected_multihead_attention_forward");
  return op.call(HEADWISE_UNPACK_MULTIHEAD(in));
}
CoreForward call_forward(const CoreInputs& in) {
  static auto op =
      find<CoreForward(HEADWISE_CORE_PARAMETERS)>("headwise::_selected_attention_forward");
  return op.call(HEADWISE_UNPACK_CORE(in));
}

SelfBackward call_backward(const Tensor& grad_output, const SelfInputs& in, const LayerSaved& saved,
                           const Needs<7>& needs) {
  static auto op =
      find<SelfBackward(const Tensor&, HEADWISE_SELF_PARAMETERS, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, const Tensor&, std::array<bool, 7>)>(
          "headwise::_selected_self_attention_backward");
  return op.call(grad_output, HEADWISE_UNPACK_SELF(in), saved.q, saved.k, saved.v, saved.context,
                 saved.lse, needs);
}
MultiheadBackward call_backward(const Tensor& grad_output, const MultiheadInputs& in,
                                const LayerSaved& saved, const Needs<15>& needs) {
  static auto op = find<MultiheadBackward(const Tensor&, HEADWISE_MULTIHEAD_PARAMETERS,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor&, std::array<bool, 15>)>(
      "headwise::_selected_multihead_attention_backward");
  return op.call(grad_output, HEADWISE_UNPACK_MULTIHEAD(in), saved.q, saved.k, saved.v,
                 saved.context, saved.lse, needs);
}
CoreBackward call_backward(const Tensor& grad_output, const CoreInputs& in, const Tensor& output,
                           const Tensor& context, const Tensor& lse, const Needs<5>& needs) {
  static auto op = find<CoreBackward(const Tensor&, HEADWISE_CORE_PARAMETERS, const Tensor&,
                                     const Tensor&, const Tensor&, std::array<bool, 5>)>(
      "headwise::_selected_attention_backward");
  return op.call(grad_output, HEADWISE_UNPACK_CORE(in), output, context, lse, needs);
}

Tensor call(const RoutedInputs& in) {
  static auto op = find<Tensor(HEADWISE_ROUTED_PARAMETERS)>("headwise::routed_multihead_attention");
  return op.call(HEADWISE_UNPACK_ROUTED(in));
}
LayerForward call_forward(const RoutedInputs& in) {
  static auto op = find<LayerForward(HEADWISE_ROUTED_PARAMETERS)>(
      "headwise::_routed_multihead_attention_forward");
  return op.call(HEADWISE_UNPACK_ROUTED(in));
}
MultiheadBackward call_backward(const Tensor& grad_output, const RoutedInputs& in,
                                const LayerSaved& saved, const Needs<15>& needs) {
  static auto op = find<MultiheadBackward(const Tensor&, HEADWISE_ROUTED_PARAMETERS, const Tensor&,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, std::array<bool, 15>)>(
      "headwise::_routed_multihead_attention_backward");
  return op.call(grad_output, HEADWISE_UNPACK_ROUTED(in), saved.q, saved.k, saved.v, saved.context,
                 saved.lse, needs);
}

Tensor call(const ProjectionInputs& in) {
  static auto op = find<Tensor(HEADWISE_PROJECTION_PARAMETERS)>("headwise::selected_projection");
  return op.call(in.x, in.weight, in.bias, in.num_heads, in.index, in.count);
}
Tensor call(const OutputInputs& in) {
  static auto op = find<Tensor(HEADWISE_OUTPUT_PARAMETERS)>("headwise::selected_output_projection");
  return op.call(in.heads, in.weight, in.bias, in.index, in.count, in.head_weight);
}
ProjectionBackward call_backward(const Tensor& grad_output, const ProjectionInputs& in,
                                 const Needs<3>& needs) {
  static auto op = find<ProjectionBackward(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                           const Tensor&, const Tensor&, std::array<bool, 3>)>(
      "headwise::_selected_projection_backward");
  return op.call(grad_output, in.x, in.weight, in.num_heads, in.index, in.count, needs);
}
OutputBackward call_backward(const Tensor& grad_output, const OutputInputs& in,
                             const Needs<4>& needs) {
  static auto op = find<OutputBackward(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                       const Tensor&, const OptionalTensor&, std::array<bool, 4>)>(
      "headwise::_selected_output_projection_backward");
  return op.call(grad_output, in.heads, in.weight, in.index, in.count, in.head_weight, needs);
}

}  // namespace ops

at::Tensor selected_self_attention(const at::Tensor& x, const at::Tensor& in_proj_weight,
                                   const std::optional<at::Tensor>& in_proj_bias,
                                   const at::Tensor& out_proj_weight,
                                   const std::optional<at::Tensor>& out_proj_bias,
                                   int64_t num_heads, const at::Tensor& index,
                                   const at::Tensor& count, const at::Tensor& weight,
                                   const AttentionArguments& arguments) {
  return ops::call(ops::SelfInputs{x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias,
                                   num_heads, index, count, weight, arguments});
}

at::Tensor selected_multihead_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const ProjectionWeights& weights,
                                        int64_t num_heads, const at::Tensor& index,
                                        const at::Tensor& count, const at::Tensor& weight,
                                        const AttentionArguments& arguments) {
  return ops::call(
      ops::MultiheadInputs{query, key, value, weights, num_heads, index, count, weight, arguments});
}

at::Tensor routed_multihead_attention(const at::Tensor& query, const at::Tensor& key,
                                      const at::Tensor& value, const ProjectionWeights& weights,
                                      int64_t num_heads, const at::Tensor& chosen,
                                      const at::Tensor& weight,
                                      const AttentionArguments& arguments) {
  return ops::call(
      ops::RoutedInputs{query, key, value, weights, num_heads, chosen, weight, arguments});
}

at::Tensor selected_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& index, const at::Tensor& count,
                              const std::optional<at::Tensor>& weight,
                              const AttentionArguments& arguments) {
  return ops::call(ops::CoreInputs{q, k, v, index, count, weight, arguments});
}

at::Tensor selected_projection(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, int64_t num_heads,
                               const at::Tensor& index, const at::Tensor& count) {
  return ops::call(ops::ProjectionInputs{x, weight, bias, num_heads, index, count});
}

at::Tensor selected_output_projection(const at::Tensor& heads, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const at::Tensor& index, const at::Tensor& count,
                                      const std::optional<at::Tensor>& head_weight) {
  return ops::call(ops::OutputInputs{heads, weight, bias, index, count, head_weight});
}

std::tuple<at::Tensor, at::Tensor> attention_statistics(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& query_padding_mask, const std::optional<at::Tensor>& attn_mask,
    bool is_causal, std::optional<double> scale) {
  static auto op = find<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool,
      std::optional<double>)>("headwise::attention_statistics");
  return op.call(q, k, key_padding_mask, query_padding_mask, attn_mask, is_causal, scale);
}

at::Tensor attention_entropy(const at::Tensor& q, const at::Tensor& k,
                             const std::optional<at::Tensor>& key_padding_mask,
                             const std::optional<at::Tensor>& query_padding_mask,
                             const std::optional<at::Tensor>& attn_mask, bool is_causal,
                             std::optional<double> scale) {
  static auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool,
                      std::optional<double>)>("headwise::attention_entropy");
  return op.call(q, k, key_padding_mask, query_padding_mask, attn_mask, is_causal, scale);
}

}  // namespace headwise

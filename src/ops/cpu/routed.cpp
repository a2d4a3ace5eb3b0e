// CPU kernels of routed_multihead_attention: tensors in, raw pointers to src/kernels/cpu.
#include "kernels/cpu/routed.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/cpu/layer_call.h"
#include "ops/input_tensors.h"

namespace headwise::ops {
namespace {

using at::Tensor;

/// A call, ready for the kernels: the heads that some token of a sequence chose, and their tokens.
template <typename T, typename Acc = T>
struct RoutedCall {
  std::vector<int64_t> tokens, begin;
  LayerCall<T, Acc> call;
  kernels::RoutedLayer<T, Acc> routed;

  explicit RoutedCall(const RoutedInputs& in)
      : call(selected(in), true), routed{call.layer, tokens, begin} {
    call.layer.round = nullptr;  // what backward reads is kept as it was computed
  }

 private:
  /// The inputs with every sequence's heads; fills the lists of tokens.
  MultiheadInputs selected(const RoutedInputs& in) {
    const int64_t batch = in.chosen.size(0), length = in.chosen.size(1), heads = in.num_heads;
    const auto chosen = in.chosen.contiguous();
    const bool* const flags = chosen.const_data_ptr<bool>();
    auto index = at::full({batch, heads}, -1, at::kInt), count = at::zeros({batch}, at::kInt);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        const size_t before = tokens.size();
        for (int64_t i = 0; i < length; ++i)
          if (flags[(b * length + i) * heads + h]) tokens.push_back(i);
        if (tokens.size() == before) continue;
        begin.push_back(before);
        int& n = count.mutable_data_ptr<int>()[b];
        index.mutable_data_ptr<int>()[b * heads + n++] = h;
      }
    begin.push_back(tokens.size());
    return {in.query, in.key, in.value,  in.weights,  in.num_heads,
            index,    count,  in.weight, in.arguments};
  }
};

template <typename T, typename Acc>
Tensor run_packed(const RoutedCall<T, Acc>& call, const Tensor& like) {
  const auto& s = call.call.layer.shape;
  const auto options = like.options().dtype(scalar_type_of<T>());
  auto output = at::empty({s.batch, s.queries, call.call.layer.out_width}, options);
  auto context = at::empty({int64_t(call.tokens.size()), s.width}, options);
  kernels::routed_forward_packed<T>(call.routed, context.template mutable_data_ptr<T>(),
                                    output.template mutable_data_ptr<T>());
  return output.to(like.scalar_type());
}

template <typename T>
LayerForward run_plain(const RoutedCall<T>& call, const Tensor& like) {
  const auto& s = call.call.layer.shape;
  const auto options = like.options().dtype(scalar_type_of<T>());
  auto output = at::empty({s.batch, s.queries, call.call.layer.out_width}, options);
  auto q = at::empty({s.batch, s.num_heads, s.queries, s.width}, options);
  auto k = at::empty({s.batch, s.num_heads, s.keys + s.added, s.width}, options);
  auto v = at::empty_like(k), context = at::empty_like(q);
  auto lse = at::empty({s.batch, s.num_heads, s.queries}, options);
  const kernels::LayerWorkspace<T> workspace{
      q.template mutable_data_ptr<T>(), k.template mutable_data_ptr<T>(),
      v.template mutable_data_ptr<T>(), context.template mutable_data_ptr<T>(),
      lse.template mutable_data_ptr<T>()};
  kernels::routed_forward<T>(call.routed, workspace, output.template mutable_data_ptr<T>());
  return {output.to(like.scalar_type()), q, k, v, context, lse};
}

Tensor routed(HEADWISE_ROUTED_PARAMETERS) {
  const auto in = HEADWISE_ROUTED_INPUTS;
  check_inputs(in);
  if (query.scalar_type() == at::kBFloat16) {
    const RoutedCall<at::BFloat16, float> call(in);
    if (kernels::packed_layer_supported(call.call.layer)) return run_packed(call, query);
  }
  return dispatch(query.scalar_type(), [&]<typename T>(T) -> Tensor {
    const RoutedCall<T> call(in);
    if constexpr (std::is_same_v<T, float>)
      if (kernels::packed_layer_supported(call.call.layer)) return run_packed(call, query);
    return std::get<0>(run_plain(call, query));
  });
}

LayerForward routed_forward(HEADWISE_ROUTED_PARAMETERS) {
  const auto in = HEADWISE_ROUTED_INPUTS;
  check_inputs(in);
  return dispatch(query.scalar_type(), [&]<typename T>(T) -> LayerForward {
    return run_plain(RoutedCall<T>(in), query);
  });
}

MultiheadBackward routed_backward(const Tensor& grad_output, HEADWISE_ROUTED_PARAMETERS,
                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& context, const Tensor& lse,
                                  std::array<bool, 15> needs) {
  const auto in = HEADWISE_ROUTED_INPUTS;
  const LayerSaved saved{q, k, v, context, lse};
  check_backward(grad_output, in, saved);
  return dispatch(query.scalar_type(), [&]<typename T>(T) -> MultiheadBackward {
    RoutedCall<T> call(in);
    const auto grad = grad_output.to(scalar_type_of<T>()).contiguous();
    return general_gradients<T, T>(in, true, needs, [&](const auto& gradients) {
      kernels::routed_backward<T>(call.routed, call.call.workspace(saved),
                                  grad.template const_data_ptr<T>(), gradients);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("routed_multihead_attention", routed);
  m.impl("_routed_multihead_attention_forward", routed_forward);
  m.impl("_routed_multihead_attention_backward", routed_backward);
}

}  // namespace headwise::ops

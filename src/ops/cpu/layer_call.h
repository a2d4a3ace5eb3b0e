// Converts the inputs of a layer's operators to what its CPU kernels read.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/layer.h"
#include "ops/attention_ops.h"
#include "ops/cpu/attention_call.h"
#include "ops/input_tensors.h"

namespace headwise::ops {

/// Contiguous, in the type that is asked for; kept so that pointers into it stay valid.
struct Operands {
  std::vector<Tensor> kept;
  template <typename T>
  const T* pointer(const OptionalTensor& t) {
    if (!t) return nullptr;
    kept.push_back(t->to(scalar_type_of<T>()).contiguous());
    return kept.back().template const_data_ptr<T>();
  }
  template <typename T>
  kernels::Rows<const T> rows(const Tensor& t) {
    const T* data = pointer<T>(t);
    return {data, t.size(1) * t.size(2), t.size(2), t.size(2)};
  }
};

template <typename Narrow>
void round_to(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<Narrow>(x[i]));
}

/// The function that rounds the floats of a call to `type`; none if it is not narrower.
template <typename Acc>
auto rounding(at::ScalarType type) -> void (*)(Acc*, int64_t) {
  if constexpr (std::is_same_v<Acc, float>) {
    if (type == at::kHalf) return round_to<at::Half>;
    if (type == at::kBFloat16) return round_to<at::BFloat16>;
  }
  return nullptr;
}

/// A layer call, ready for the kernels.
template <typename T, typename Acc = T>
struct LayerCall {
  MaskedShape<Acc> masked;
  Operands operands;
  kernels::Layer<T, Acc> layer;
  int64_t columns;

  LayerCall(const SelfInputs& in, bool compact)
      : masked(in.arguments, in.x, in.x.size(0), in.num_heads, in.x.size(1), in.x.size(1), 0,
               head_width(in.out_proj_weight, in.num_heads),
               head_width(in.out_proj_weight, in.num_heads)),
        columns(in.index.size(1)) {
    const int64_t e = in.out_proj_weight.size(1), width = in.x.size(2);
    layer.query = layer.key = layer.value = operands.rows<T>(in.x);
    layer.q_weight = operands.pointer<T>(in.in_proj_weight);
    layer.k_weight = layer.q_weight + e * width;
    layer.v_weight = layer.k_weight + e * width;
    if (in.in_proj_bias) {
      layer.q_bias = operands.pointer<Acc>(in.in_proj_bias);
      layer.k_bias = layer.q_bias + e;
      layer.v_bias = layer.k_bias + e;
    }
    finish(in.out_proj_weight, in.out_proj_bias, in.index, in.count, in.weight, in.num_heads,
           compact);
  }

  LayerCall(const MultiheadInputs& in, bool compact)
      : masked(in.arguments, in.query, in.query.size(0), in.num_heads, in.query.size(1),
               in.key.size(1), added_rows(in.weights),
               head_width(in.weights.out_proj_weight, in.num_heads),
               head_width(in.weights.out_proj_weight, in.num_heads)),
        columns(in.index.size(1)) {
    const auto& w = in.weights;
    layer.query = operands.rows<T>(in.query);
    layer.key = operands.rows<T>(in.key);
    layer.value = operands.rows<T>(in.value);
    layer.q_weight = operands.pointer<T>(w.q_weight);
    layer.k_weight = operands.pointer<T>(w.k_weight);
    layer.v_weight = operands.pointer<T>(w.v_weight);
    layer.q_bias = operands.pointer<Acc>(w.q_bias);
    layer.k_bias = operands.pointer<Acc>(w.k_bias);
    layer.v_bias = operands.pointer<Acc>(w.v_bias);
    layer.bias_k = operands.pointer<Acc>(w.bias_k);
    layer.bias_v = operands.pointer<Acc>(w.bias_v);
    layer.zero_row = w.add_zero_attn;
    finish(w.out_proj_weight, w.out_proj_bias, in.index, in.count, in.weight, in.num_heads,
           compact);
  }
  LayerCall(const LayerCall&) = delete;

  kernels::LayerWorkspace<const T, const Acc> workspace(const LayerSaved& saved) {
    return {operands.pointer<T>(saved.q), operands.pointer<T>(saved.k),
            operands.pointer<T>(saved.v), operands.pointer<T>(saved.context),
            operands.pointer<Acc>(saved.lse)};
  }

 private:
  static int64_t head_width(const Tensor& out_weight, int64_t num_heads) {
    return num_heads ? out_weight.size(1) / num_heads : 0;
  }
  void finish(const Tensor& out_weight, const OptionalTensor& out_bias, const Tensor& index,
              const Tensor& count, const Tensor& weight, int64_t num_heads, bool compact) {
    layer.shape = masked.shape;
    layer.out_weight = operands.pointer<T>(out_weight);
    layer.out_bias = operands.pointer<Acc>(out_bias);
    layer.round = rounding<Acc>(out_weight.scalar_type());
    layer.out_width = out_weight.size(0);
    layer.head_weight = operands.pointer<Acc>(weight);
    auto list = list_active(index, count, num_heads, compact);
    layer.active = std::move(list.heads);
    layer.first = std::move(list.first);
  }
};

/// The gradients of the general form; `run(gradients)` calls the kernel that writes them.
template <typename T, typename Acc, typename Inputs, typename Run>
MultiheadBackward general_gradients(const Inputs& in, bool zeroed, std::array<bool, 15> needs,
                                    const Run& run) {
  const Gradients<Acc> make{in.query.options(), zeroed};
  kernels::LayerGradients<T, Acc> g;
  const auto inputs = differentiable(in);
  std::array<Tensor, 15> results;
  const auto large = [&](int i, T*& to) {
    to = make.template large<T>(needs[i], inputs[i], results[i]);
  };
  const auto zeros = [&](int i, Acc*& to) { to = make.make(needs[i], inputs[i], results[i]); };
  large(0, g.query), large(1, g.key), large(2, g.value);
  large(3, g.q_weight), large(4, g.k_weight), large(5, g.v_weight);
  zeros(6, g.q_bias), zeros(7, g.k_bias), zeros(8, g.v_bias);
  large(9, g.out_weight), zeros(10, g.out_bias), zeros(11, g.head_weight);
  zeros(12, g.bias_k), zeros(13, g.bias_v);
  const auto mask = make.mask(needs[14], in.arguments.attn_mask, g.mask);
  run(g);
  for (int i = 0; i < 14; ++i) results[i] = make.result(results[i], inputs[i], needs[i]);
  results[14] = make.mask_result(mask, in.arguments.attn_mask);
  return std::tuple_cat(results);
}

}  // namespace headwise::ops

// The derivative of an attention operator, whichever inputs it has: forward keeps what backward
// reads, backward is one operator.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/input_tensors.h"

namespace headwise::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Inputs>
void save(AutogradContext* ctx, Inputs in, variable_list results) {
  variable_list tensors;
  visit(in, [&](const OptionalTensor& t) { tensors.push_back(t.value_or(at::Tensor())); });
  tensors.insert(tensors.end(), results.begin(), results.end());
  ctx->save_for_backward(std::move(tensors));
  auto& data = ctx->saved_data;
  data["is_causal"] = in.arguments.is_causal;
  data["dropout_p"] = in.arguments.dropout_p;
  data["scale"] = in.arguments.scale;
  if constexpr (requires { in.num_heads; }) data["num_heads"] = in.num_heads;
  if constexpr (GeneralInputs<Inputs>) data["add_zero_attn"] = in.weights.add_zero_attn;
}

/// The inputs again, and the results that were saved after them.
template <typename Inputs>
Inputs load(AutogradContext* ctx, variable_list& results) {
  auto tensors = ctx->get_saved_variables();
  auto next = tensors.begin();
  Inputs in{};
  struct Assign {
    variable_list::iterator& next;
    void operator()(at::Tensor& t) const { t = *next++; }
    void operator()(OptionalTensor& t) const {
      t = next->defined() ? OptionalTensor(*next) : OptionalTensor();
      ++next;
    }
  };
  visit(in, Assign{next});
  results.assign(next, tensors.end());
  auto& data = ctx->saved_data;
  in.arguments.is_causal = data["is_causal"].toBool();
  in.arguments.dropout_p = data["dropout_p"].toDouble();
  in.arguments.scale = data["scale"].toOptional<double>();
  if constexpr (requires { in.num_heads; }) in.num_heads = data["num_heads"].toInt();
  if constexpr (GeneralInputs<Inputs>) in.weights.add_zero_attn = data["add_zero_attn"].toBool();
  return in;
}

template <typename Inputs>
struct AttentionFunction : torch::autograd::Function<AttentionFunction<Inputs>> {
  // `tensors` are the differentiable inputs that were given: autograd sees those, in that order.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList tensors, const Inputs& in) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return std::apply(
        [&](const at::Tensor& output, const auto&... results) {
          if constexpr (std::is_same_v<Inputs, CoreInputs>)
            save(ctx, in, {output, results...});
          else
            save(ctx, in, {results...});
          return output;
        },
        call_forward(in));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    variable_list r;
    const auto in = load<Inputs>(ctx, r);
    const auto inputs = differentiable(in);
    Needs<std::tuple_size_v<decltype(differentiable(in))>> needs{};
    size_t edge = 0;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = inputs[i] && ctx->needs_input_grad(edge++);
    const auto computed = [&] {
      if constexpr (std::is_same_v<Inputs, CoreInputs>)
        return call_backward(grad_outputs[0], in, r[0], r[1], r[2], needs);
      else
        return call_backward(grad_outputs[0], in, LayerSaved{r[0], r[1], r[2], r[3], r[4]}, needs);
    }();
    variable_list gradients;
    std::apply(
        [&](const auto&... gradient) {
          int i = 0;
          ((inputs[i] ? gradients.push_back(needs[i] ? gradient : at::Tensor()) : void(), ++i),
           ...);
        },
        computed);
    gradients.emplace_back();  // the struct of inputs
    return gradients;
  }
};

/// A key padding mask that requires a gradient is passed as an attention mask, which has one.
template <typename Inputs>
Inputs with_differentiable_masks(Inputs in) {
  auto& a = in.arguments;
  if (a.key_padding_mask && a.key_padding_mask->requires_grad()) {
    const auto rows = a.key_padding_mask->unsqueeze(1).unsqueeze(1);  // [B, 1, 1, S]
    if (!a.attn_mask) {
      a.attn_mask = rows;
    } else if (a.attn_mask->scalar_type() == at::kBool) {
      a.attn_mask = rows.masked_fill(*a.attn_mask, -std::numeric_limits<double>::infinity());
    } else {
      a.attn_mask = rows.add(*a.attn_mask);
    }
    a.key_padding_mask.reset();
  }
  return in;
}

template <typename Inputs>
at::Tensor differentiate(const Inputs& given) {
  const auto in = with_differentiable_masks(given);
  variable_list tensors;
  bool tracked = false;
  for (const auto& t : differentiable(in)) {
    if (!t) continue;
    tensors.push_back(*t);
    tracked |= t->_fw_grad(0).defined() || (at::GradMode::is_enabled() && t->requires_grad());
  }
  if (!tracked) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(in);
  }
  const at::TensorList list(tensors);
  return AttentionFunction<Inputs>::apply(list, in);
}

}  // namespace headwise::ops

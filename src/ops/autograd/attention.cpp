// The derivative of the attention operators: forward keeps the projections and the log of the
// softmax denominators of the chosen heads, backward is one operator.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "ops/attention_ops.h"

namespace headwise::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Visits every tensor of the inputs, in one fixed order; f takes Tensor& or OptionalTensor&.
template <typename F>
void visit(AttentionArguments& a, const F& f) {
  f(a.key_padding_mask), f(a.attn_mask), f(a.dropout_seed);
}
template <typename F>
void visit(SelfInputs& in, const F& f) {
  f(in.x), f(in.in_proj_weight), f(in.in_proj_bias), f(in.out_proj_weight), f(in.out_proj_bias);
  f(in.index), f(in.count), f(in.weight), visit(in.arguments, f);
}
template <typename F>
void visit(MultiheadInputs& in, const F& f) {
  auto& w = in.weights;
  f(in.query), f(in.key), f(in.value), f(w.q_weight), f(w.k_weight), f(w.v_weight);
  f(w.q_bias), f(w.k_bias), f(w.v_bias), f(w.out_proj_weight), f(w.out_proj_bias);
  f(w.bias_k), f(w.bias_v), f(in.index), f(in.count), f(in.weight), visit(in.arguments, f);
}
template <typename F>
void visit(CoreInputs& in, const F& f) {
  f(in.q), f(in.k), f(in.v), f(in.index), f(in.count), f(in.weight), visit(in.arguments, f);
}

// What gradients are computed for, in the order in which the backward operators return them.
using Differentiable = std::vector<OptionalTensor>;
OptionalTensor floating(const OptionalTensor& mask) {
  return mask && mask->is_floating_point() ? mask : OptionalTensor();
}
Differentiable differentiable(const SelfInputs& in) {
  return {in.x,
          in.in_proj_weight,
          in.in_proj_bias,
          in.out_proj_weight,
          in.out_proj_bias,
          in.weight,
          floating(in.arguments.attn_mask)};
}
Differentiable differentiable(const MultiheadInputs& in) {
  const auto& w = in.weights;
  return {in.query,        in.key,    in.value, w.q_weight, w.k_weight,
          w.v_weight,      w.q_bias,  w.k_bias, w.v_bias,   w.out_proj_weight,
          w.out_proj_bias, in.weight, w.bias_k, w.bias_v,   floating(in.arguments.attn_mask)};
}
Differentiable differentiable(const CoreInputs& in) {
  return {in.q, in.k, in.v, in.weight, floating(in.arguments.attn_mask)};
}

int64_t* num_heads_of(SelfInputs& in) { return &in.num_heads; }
int64_t* num_heads_of(MultiheadInputs& in) { return &in.num_heads; }
int64_t* num_heads_of(CoreInputs&) { return nullptr; }
bool* zero_row_of(MultiheadInputs& in) { return &in.weights.add_zero_attn; }
template <typename Inputs>
bool* zero_row_of(Inputs&) {
  return nullptr;
}

template <typename Inputs>
void save(AutogradContext* ctx, Inputs in, variable_list results) {
  variable_list tensors;
  visit(in, [&](const OptionalTensor& t) { tensors.push_back(t.value_or(Tensor())); });
  tensors.insert(tensors.end(), results.begin(), results.end());
  ctx->save_for_backward(std::move(tensors));
  auto& data = ctx->saved_data;
  data["is_causal"] = in.arguments.is_causal;
  data["dropout_p"] = in.arguments.dropout_p;
  data["scale"] = in.arguments.scale;
  if (auto* value = num_heads_of(in)) data["num_heads"] = *value;
  if (auto* value = zero_row_of(in)) data["add_zero_attn"] = *value;
}

/// The inputs again, and the results that were saved after them.
template <typename Inputs>
Inputs load(AutogradContext* ctx, variable_list& results) {
  auto tensors = ctx->get_saved_variables();
  auto next = tensors.begin();
  Inputs in{};
  struct Assign {
    variable_list::iterator& next;
    void operator()(Tensor& t) const { t = *next++; }
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
  if (auto* value = num_heads_of(in)) *value = data["num_heads"].toInt();
  if (auto* value = zero_row_of(in)) *value = data["add_zero_attn"].toBool();
  return in;
}

Tensor run_forward(const CoreInputs& in, variable_list& results) {
  auto [output, context, lse] = call_forward(in);
  results = {output, context, lse};
  return output;
}
template <typename Inputs>
Tensor run_forward(const Inputs& in, variable_list& results) {
  auto [output, q, k, v, context, lse] = call_forward(in);
  results = {q, k, v, context, lse};
  return output;
}
SelfBackward run_backward(const Tensor& grad, const SelfInputs& in, const variable_list& r,
                          const Needs<7>& needs) {
  return call_backward(grad, in, LayerSaved{r[0], r[1], r[2], r[3], r[4]}, needs);
}
MultiheadBackward run_backward(const Tensor& grad, const MultiheadInputs& in,
                               const variable_list& r, const Needs<15>& needs) {
  return call_backward(grad, in, LayerSaved{r[0], r[1], r[2], r[3], r[4]}, needs);
}
CoreBackward run_backward(const Tensor& grad, const CoreInputs& in, const variable_list& r,
                          const Needs<5>& needs) {
  return call_backward(grad, in, r[0], r[1], r[2], needs);
}

template <typename Inputs, int N>
struct AttentionFunction : torch::autograd::Function<AttentionFunction<Inputs, N>> {
  // `tensors` are the differentiable inputs that were given: autograd sees those, in that order.
  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, const Inputs& in) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list results;
    Tensor output = run_forward(in, results);
    save(ctx, in, std::move(results));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    variable_list results;
    auto in = load<Inputs>(ctx, results);
    const auto inputs = differentiable(in);
    Needs<N> needs{};
    size_t edge = 0;
    for (int i = 0; i < N; ++i) needs[i] = inputs[i] && ctx->needs_input_grad(edge++);
    auto computed = run_backward(grad_outputs[0], in, results, needs);
    variable_list gradients;
    std::apply(
        [&](const auto&... gradient) {
          int i = 0;
          ((inputs[i] ? gradients.push_back(needs[i] ? gradient : Tensor()) : void(), ++i), ...);
        },
        computed);
    gradients.emplace_back();  // the struct of inputs
    return gradients;
  }
};

/// A key padding mask that wants a gradient travels as an attention mask, which has one.
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

template <int N, typename Inputs>
Tensor differentiate(const Inputs& given) {
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
  return AttentionFunction<Inputs, N>::apply(list, in);
}

Tensor self(HEADWISE_SELF_PARAMETERS) { return differentiate<7>(HEADWISE_SELF_INPUTS); }
Tensor multihead(HEADWISE_MULTIHEAD_PARAMETERS) {
  return differentiate<15>(HEADWISE_MULTIHEAD_INPUTS);
}
Tensor core(HEADWISE_CORE_PARAMETERS) { return differentiate<5>(HEADWISE_CORE_INPUTS); }

}  // namespace

TORCH_LIBRARY_IMPL(headwise, Autograd, m) {
  m.impl("selected_self_attention", self);
  m.impl("selected_multihead_attention", multihead);
  m.impl("selected_attention", core);
  // Second derivatives say that they do not exist.
  for (const char* name :
       {"_selected_self_attention_forward", "_selected_self_attention_backward",
        "_selected_multihead_attention_forward", "_selected_multihead_attention_backward",
        "_selected_attention_forward", "_selected_attention_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace headwise::ops

#include "headwise/multihead_attention.h"

#include <torch/nn/init.h>

#include <limits>
#include <tuple>

#include "attention_masks.h"
#include "gates/helpers.h"
#include "headwise/dense_attention.h"
#include "layer_sizes.h"
#include "module_copy.h"
#include "recomputation.h"

namespace headwise {
namespace {

/// Whether both are the same values in the same memory, as one tensor object or two.
bool same_memory(const at::Tensor& a, const at::Tensor& b) {
  return a.is_same(b) || (a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
                          a.strides() == b.strides() && a.storage_offset() == b.storage_offset() &&
                          a.is_alias_of(b));
}

}  // namespace

MultiheadAttentionImpl::MultiheadAttentionImpl(MultiheadAttentionOptions options_)
    : torch::nn::Module("headwise::MultiheadAttention"), options(std::move(options_)) {
  check_layer_sizes(options.embed_dim(), options.num_heads(), options.head_dim(),
                    options.dropout());
  const auto embed_dim = options.embed_dim();
  head_dim_ =
      options.head_dim().has_value() ? *options.head_dim() : embed_dim / options.num_heads();
  const auto kdim = options.kdim().value_or(embed_dim), vdim = options.vdim().value_or(embed_dim);
  same_embed_dim_ = kdim == embed_dim && vdim == embed_dim;
  const int64_t width = options.num_heads() * head_dim_;  // E
  const auto tensors = at::TensorOptions().device(options.device()).dtype(options.dtype());

  const auto parameter = [&](const char* name, at::IntArrayRef sizes) {
    return register_parameter(name, torch::empty(sizes, tensors));
  };
  if (same_embed_dim_) {
    in_proj_weight = parameter("in_proj_weight", {3 * width, embed_dim});
  } else {
    q_proj_weight = parameter("q_proj_weight", {width, embed_dim});
    k_proj_weight = parameter("k_proj_weight", {width, kdim});
    v_proj_weight = parameter("v_proj_weight", {width, vdim});
  }
  if (options.bias()) {
    in_proj_bias = parameter("in_proj_bias", {3 * width});
  }
  if (options.add_bias_kv()) {
    bias_k = parameter("bias_k", {1, 1, width});
    bias_v = parameter("bias_v", {1, 1, width});
  }
  out_proj = register_module("out_proj", make_linear(width, embed_dim, options.bias(), tensors));
  reset_parameters();
  if (options.gate()) {
    set_gate(*options.gate());
  }
}

void MultiheadAttentionImpl::reset_parameters() {
  for (auto* weight : {&in_proj_weight, &q_proj_weight, &k_proj_weight, &v_proj_weight}) {
    if (weight->defined() && weight->numel() > 0) {
      torch::nn::init::xavier_uniform_(*weight);
    }
  }
  if (in_proj_bias.defined()) {
    torch::nn::init::zeros_(in_proj_bias);
    torch::nn::init::zeros_(out_proj->bias);
  }
  for (auto* row : {&bias_k, &bias_v}) {
    if (row->defined() && row->numel() > 0) {
      torch::nn::init::xavier_normal_(*row);
    }
  }
}

void MultiheadAttentionImpl::reset() {
  if (out_proj->weight.numel() > 0) out_proj->reset_parameters();
  reset_parameters();
  if (gate) gate->reset();
}

void MultiheadAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << name() << "(embed_dim=" << options.embed_dim() << ", num_heads=" << options.num_heads();
  const auto flag = [&](const char* option, bool value, bool initial) {
    if (value != initial) stream << ", " << option << "=" << (value ? "true" : "false");
  };
  const auto size = [&](const char* option, const std::optional<int64_t>& value) {
    if (value) stream << ", " << option << "=" << *value;
  };
  if (options.dropout() != 0.0) stream << ", dropout=" << options.dropout();
  flag("bias", options.bias(), true);
  flag("add_bias_kv", options.add_bias_kv(), false);
  flag("add_zero_attn", options.add_zero_attn(), false);
  size("kdim", options.kdim());
  size("vdim", options.vdim());
  flag("batch_first", options.batch_first(), false);
  size("head_dim", options.head_dim());
  stream << ")";
}

std::shared_ptr<torch::nn::Module> MultiheadAttentionImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto plain = options;
  plain.gate(std::nullopt);
  auto copy = std::make_shared<MultiheadAttentionImpl>(plain);
  copy->options = options;
  if (gate) {
    auto own = std::dynamic_pointer_cast<GateImpl>(gate->clone(device));
    copy->gate = named_children().contains("gate") ? copy->register_module("gate", own) : own;
  }
  copy_tensors(*this, *copy, device);
  return copy;
}

void MultiheadAttentionImpl::clone_(torch::nn::Module& original,
                                    const std::optional<torch::Device>& device) {
  const auto copy = std::dynamic_pointer_cast<MultiheadAttentionImpl>(original.clone(device));
  TORCH_CHECK(copy, "the clone of a ", original.name(), " must not replace a ", name());
  *this = *copy;
}

void MultiheadAttentionImpl::set_gate(const GateOptions& gate_options) {
  auto bound = make_gate(gate_options, options.embed_dim(), options.num_heads(),
                         out_proj->weight.options().requires_grad(false));
  bound->train(is_training());
  gate = gate ? replace_module("gate", bound) : register_module("gate", bound);
  options.gate(gate_options);
}

ProjectionWeights MultiheadAttentionImpl::projections() const {
  ProjectionWeights w;
  if (same_embed_dim_) {
    const auto parts = in_proj_weight.tensor_split(3);  // [E, D] each
    w.q_weight = parts[0];
    w.k_weight = parts[1];
    w.v_weight = parts[2];
  } else {
    w.q_weight = q_proj_weight;
    w.k_weight = k_proj_weight;
    w.v_weight = v_proj_weight;
  }
  if (in_proj_bias.defined()) {
    const auto parts = in_proj_bias.tensor_split(3);  // [E] each
    w.q_bias = parts[0];
    w.k_bias = parts[1];
    w.v_bias = parts[2];
  }
  w.out_proj_weight = out_proj->weight;
  w.out_proj_bias = optional(out_proj->bias);
  if (bias_k.defined()) {
    w.bias_k = bias_k.reshape({-1});
    w.bias_v = bias_v.reshape({-1});
  }
  w.add_zero_attn = options.add_zero_attn();
  return w;
}

std::tuple<at::Tensor, at::Tensor> MultiheadAttentionImpl::forward(
    const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
    const at::Tensor& key_padding_mask_, bool need_weights, const at::Tensor& attn_mask_,
    bool average_attn_weights, bool is_causal) {
  auto query = query_, key = key_, value = value_;
  auto key_padding_mask = key_padding_mask_, attn_mask = attn_mask_;
  const int64_t num_heads = options.num_heads();
  const int64_t kdim = options.kdim().value_or(options.embed_dim());
  const int64_t vdim = options.vdim().value_or(options.embed_dim());
  const bool batched = query.dim() == 3;
  TORCH_CHECK_VALUE(
      (query.dim() == 2 || batched) && key.dim() == query.dim() && value.dim() == query.dim(),
      "query, key and value must all have 3 dimensions, or 2 for an unbatched input, got ",
      query.dim(), ", ", key.dim(), " and ", value.dim());
  const bool query_is_key = same_memory(query, key);
  bool self_attention = query_is_key && same_memory(key, value);
  if (self_attention && at::GradMode::is_enabled()) {
    // Views of one tensor, as hooks pass them on, have separate gradients.
    const bool apart = query.requires_grad() || key.requires_grad() || value.requires_grad();
    self_attention = (query.is_same(key) && key.is_same(value)) || !apart;
  }
  if (!batched) {
    query = query.unsqueeze(0);
    key = key.unsqueeze(0);
    value = value.unsqueeze(0);
    key_padding_mask = key_padding_mask.defined() ? key_padding_mask.unsqueeze(0) : at::Tensor();
  } else if (!options.batch_first()) {
    query = query.transpose(0, 1);
    key = key.transpose(0, 1);
    value = value.transpose(0, 1);
  }
  const int64_t B = query.size(0), L = query.size(1), S = key.size(1);
  const auto check_width = [](const char* name, const at::Tensor& tensor, int64_t width) {
    TORCH_CHECK_VALUE(tensor.size(2) == width, name, " must have ", width, " features, got ",
                      tensor.size(2));
  };
  check_width("query", query, options.embed_dim());
  check_width("key", key, kdim);
  check_width("value", value, vdim);
  TORCH_CHECK_VALUE(key.size(0) == B && value.size(0) == B && value.size(1) == S,
                    "query, key and value must agree in batch, and key and value in length, got [",
                    B, ", ", L, "], [", key.size(0), ", ", S, "] and [", value.size(0), ", ",
                    value.size(1), "]");
  TORCH_CHECK(!is_causal || attn_mask.defined(),
              "is_causal is a hint about attn_mask, which must be given with it");
  check_mask("key_padding_mask", key_padding_mask);
  check_mask("attn_mask", attn_mask);
  TORCH_CHECK_VALUE(
      !key_padding_mask.defined() || key_padding_mask.sizes() == at::IntArrayRef({B, S}),
      "key_padding_mask must have shape [", B, ", ", S, "], got ", key_padding_mask.sizes());
  if (attn_mask.defined() && attn_mask.dim() == 2) {
    TORCH_CHECK_VALUE(attn_mask.sizes() == at::IntArrayRef({L, S}), "attn_mask must have shape [",
                      L, ", ", S, "], got ", attn_mask.sizes());
  } else if (attn_mask.defined()) {
    TORCH_CHECK_VALUE(attn_mask.sizes() == at::IntArrayRef({B * num_heads, L, S}),
                      "attn_mask of 3 dimensions must have shape [", B * num_heads, ", ", L, ", ",
                      S, "], got ", attn_mask.sizes());
    attn_mask = attn_mask.view({B, num_heads, L, S});
  }

  AttentionArguments arguments;
  arguments.key_padding_mask = optional(key_padding_mask);
  arguments.attn_mask = is_causal ? std::nullopt : optional(attn_mask);
  arguments.is_causal = is_causal;
  const int64_t added_keys = int64_t(bias_k.defined()) + int64_t(options.add_zero_attn());
  const auto out_bias = optional(out_proj->bias);
  // Stacked weights are passed whole: views of their parts cost time in a short call.
  const bool together = self_attention && same_embed_dim_ && added_keys == 0;
  const bool selects = gate && !gate->reads_heads();
  const auto weights =
      together && selects && !probe && !need_weights ? ProjectionWeights() : projections();

  std::optional<Selection> selection;
  HeadInputs heads;   // for gates that choose by them
  at::Tensor values;  // [B, H, S', d]
  if (gate && gate->reads_heads()) {
    // If the gate only chooses, values are projected later, for the chosen heads only.
    std::tie(heads.q, heads.k, values) = project_heads(
        query, key, gate->attends() ? value : value.narrow(1, 0, 0), weights, num_heads);
    heads.key_padding_mask = arguments.key_padding_mask;
    heads.query_padding_mask = query_is_key ? arguments.key_padding_mask : std::nullopt;
    heads.attn_mask = arguments.attn_mask;
    heads.is_causal = is_causal;
    heads.added_keys = added_keys;
    selection = gate->forward_heads(heads);
  } else if (gate) {
    // The mask is about keys: it tells which queries are padding only if queries and keys are the
    // same.
    selection = gate->forward(query, query_is_key ? key_padding_mask : at::Tensor());
  }
  at::Tensor context;  // [B, H, L, d], if a recorder wants it
  if (probe) {
    const auto [q, k, v] = project_heads(query, key, value, weights, num_heads);
    if (probe_context) {
      AttentionArguments training = arguments;
      training.dropout_p = is_training() ? options.dropout() : 0.0;
      context = gate && gate->attends() ? gate->attend(heads, values)
                                        : dense_attention(q, k, v, training, added_keys);
    }
    if (!recomputing()) {
      probe({query, optional(query_is_key ? key_padding_mask : at::Tensor()), selection, q, k,
             arguments, added_keys, context});
    }
  }
  at::Tensor probabilities;  // [B, H, L, S']
  if (need_weights) {
    const auto [q, k, v] = project_heads(query, key, value, weights, num_heads);
    probabilities = attention_probabilities(q, k, arguments, added_keys);
    if (selection) {
      const auto chosen =
          selection_mask(selection->index, selection->count, probabilities.scalar_type());
      probabilities = probabilities * chosen.unsqueeze(-1).unsqueeze(-1);
    }
    if (average_attn_weights) {
      probabilities = num_heads > 0 ? probabilities.mean(1) : probabilities.sum(1);
    }
  }

  arguments.dropout_p = is_training() ? options.dropout() : 0.0;
  at::Tensor output;  // [B, L, D]
  if (context.defined()) {
    output = combine_heads(context, selection ? std::optional(selection->weight) : std::nullopt,
                           out_proj->weight, out_bias);
  } else if (!selection) {
    const auto [q, k, v] = project_heads(query, key, value, weights, num_heads);
    const auto context = dense_attention(q, k, v, arguments, added_keys);
    output = combine_heads(context, {}, out_proj->weight, out_bias);
  } else if (gate->attends()) {
    output =
        combine_heads(gate->attend(heads, values), selection->weight, out_proj->weight, out_bias);
  } else {
    if (arguments.dropout_p > 0.0) {
      arguments.dropout_seed =
          torch::randint(std::numeric_limits<int64_t>::max(), {1},
                         query.options().dtype(at::kLong).requires_grad(false));
    }
    output =
        together
            ? selected_self_attention(query, in_proj_weight, optional(in_proj_bias),
                                      out_proj->weight, out_bias, num_heads, selection->index,
                                      selection->count, selection->weight, arguments)
            : selected_multihead_attention(query, key, value, weights, num_heads, selection->index,
                                           selection->count, selection->weight, arguments);
  }
  if (selection && on_selection && !recomputing()) on_selection(*selection);
  if (!batched) {
    output = output.squeeze(0);
    probabilities = probabilities.defined() ? probabilities.squeeze(0) : probabilities;
  } else if (!options.batch_first()) {
    output = output.transpose(0, 1);
  }
  return {output, probabilities};
}

}  // namespace headwise

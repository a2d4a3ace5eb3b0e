#include "headwise/grouped_query_attention.h"

#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_masks.h"
#include "decoding.h"
#include "gates/helpers.h"
#include "headwise/attention.h"
#include "headwise/dense_attention.h"
#include "layer_sizes.h"
#include "module_copy.h"
#include "ops/gates/selection_ops.h"
#include "recomputation.h"

namespace headwise {
namespace {

void check_sizes(const GroupedQueryAttentionOptions& o) {
  check_layer_sizes(o.embed_dim(), o.num_heads(), o.head_dim(), o.dropout());
  const int64_t heads = o.num_heads(), groups = o.num_key_value_heads().value_or(heads);
  TORCH_CHECK_VALUE(groups >= 0 && (groups == 0) == (heads == 0),
                    "num_key_value_heads must be positive, got ", groups);
  TORCH_CHECK_VALUE(o.sliding_window().value_or(1) > 0, "sliding_window must be positive, got ",
                    o.sliding_window().value_or(1));
  if (!o.key_value_heads()) {
    TORCH_CHECK_VALUE(groups == 0 || heads % groups == 0,
                      "num_key_value_heads must divide num_heads=", heads, ", got ", groups);
    return;
  }
  const auto& of = *o.key_value_heads();
  TORCH_CHECK_VALUE(static_cast<int64_t>(of.size()) == heads, "key_value_heads must have ", heads,
                    " numbers, one per query head, got ", of.size());
  int64_t last = -1;
  for (size_t head = 0; head < of.size(); ++head) {
    TORCH_CHECK_VALUE(of[head] == last || of[head] == last + 1,
                      "key_value_heads must be ascending and name each of ", groups,
                      " key/value heads, got ", of[head], " for query head ", head);
    last = of[head];
  }
  TORCH_CHECK_VALUE(last + 1 == groups, "key_value_heads must name each of ", groups,
                    " key/value heads, got ", last + 1, " of them");
}

/// Where each query head reads the same key/value head as in groups of one size.
std::vector<int64_t> even_groups(int64_t heads, int64_t groups) {
  std::vector<int64_t> of(heads);
  for (int64_t head = 0; head < heads; ++head) of[head] = head * groups / heads;
  return of;
}

bool same_for_all_heads(const AttentionArguments& masks) {
  return !masks.attn_mask || masks.attn_mask->dim() < 3 || masks.attn_mask->size(-3) == 1;
}

/// The tokens that a gate does not see; `seen` as gates_see sets it.
at::Tensor hidden_from_gate(const at::Tensor& x, const at::Tensor& padding,
                            const at::Tensor& seen) {
  if (!seen.defined()) return padding;
  const bool number = seen.dim() == 0;
  return hide_tokens(x, optional(padding), number ? std::nullopt : std::optional(seen),
                     number ? std::optional(seen.item<int64_t>()) : std::nullopt);
}

}  // namespace

GroupedQueryAttentionImpl::GroupedQueryAttentionImpl(GroupedQueryAttentionOptions options_)
    : torch::nn::Module("headwise::GroupedQueryAttention"), options(std::move(options_)) {
  check_sizes(options);
  const int64_t embed_dim = options.embed_dim(), heads = options.num_heads();
  groups_ = options.num_key_value_heads().value_or(heads);
  head_dim_ = options.head_dim() ? *options.head_dim() : embed_dim / heads;
  scale_ = options.scale().value_or(1.0 / std::sqrt(static_cast<double>(head_dim_)));
  if (options.key_value_heads() && (groups_ == 0 || heads % groups_ == 0) &&
      *options.key_value_heads() == even_groups(heads, groups_)) {
    options.key_value_heads(std::nullopt);
  }
  const auto tensors = at::TensorOptions().device(options.device()).dtype(options.dtype());
  const auto linear = [&](const char* name, int64_t in, int64_t out, bool bias) {
    return register_module(name, make_linear(in, out, bias, tensors));
  };
  q_proj = linear("q_proj", embed_dim, heads * head_dim_, options.bias());
  k_proj = linear("k_proj", embed_dim, groups_ * head_dim_, options.bias());
  v_proj = linear("v_proj", embed_dim, groups_ * head_dim_, options.bias());
  o_proj = linear("o_proj", heads * head_dim_, embed_dim,
                  options.output_bias().value_or(options.bias()));
  if (options.qk_norm_eps()) {
    const auto norm = [&](const char* name) {
      const auto module = std::make_shared<torch::nn::Module>("RMSNorm");
      register_module(name, module);
      return module->register_parameter("weight", torch::ones({head_dim_}, tensors));
    };
    q_norm = norm("q_norm");
    k_norm = norm("k_norm");
  }
  if (options.gate()) set_gate(*options.gate());
}

void GroupedQueryAttentionImpl::reset() {
  for (auto* linear : {&q_proj, &k_proj, &v_proj, &o_proj}) {
    if ((*linear)->weight.numel() > 0) (*linear)->reset_parameters();
  }
  const torch::NoGradGuard no_grad;
  for (auto* norm : {&q_norm, &k_norm}) {
    if (norm->defined()) norm->fill_(1.0);
  }
  if (gate) gate->reset();
}

void GroupedQueryAttentionImpl::pretty_print(std::ostream& stream) const {
  stream << name() << "(embed_dim=" << options.embed_dim() << ", num_heads=" << options.num_heads()
         << ", num_key_value_heads=" << groups_ << ", head_dim=" << head_dim_;
  const auto shown = [&](const char* option, const auto& value) {
    if (value) stream << ", " << option << "=" << *value;
  };
  if (options.dropout() != 0.0) stream << ", dropout=" << options.dropout();
  if (options.bias()) stream << ", bias=true";
  if (options.output_bias().value_or(options.bias()) != options.bias()) {
    stream << ", output_bias=" << (options.bias() ? "false" : "true");
  }
  shown("scale", options.scale());
  shown("qk_norm_eps", options.qk_norm_eps());
  shown("sliding_window", options.sliding_window());
  if (options.keep_selection()) stream << ", keep_selection=true";
  stream << ")";
}

std::shared_ptr<torch::nn::Module> GroupedQueryAttentionImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto plain = options;
  plain.gate(std::nullopt);
  auto copy = std::make_shared<GroupedQueryAttentionImpl>(plain);
  copy->options = options;
  for (const auto& child : named_children()) {  // a loaded projection may have no bias
    if (const auto* own = child.value()->as<torch::nn::Linear>(); own && !own->bias.defined()) {
      auto* made = copy->named_children()[child.key()]->as<torch::nn::Linear>();
      if (made->bias.defined()) copy->drop_bias(child.key());
    }
  }
  if (gate) {
    auto own = std::dynamic_pointer_cast<GateImpl>(gate->clone(device));
    copy->gate = named_children().contains("gate") ? copy->register_module("gate", own) : own;
  }
  copy_tensors(*this, *copy, device);
  return copy;
}

void GroupedQueryAttentionImpl::clone_(torch::nn::Module& original,
                                       const std::optional<torch::Device>& device) {
  const auto copy = std::dynamic_pointer_cast<GroupedQueryAttentionImpl>(original.clone(device));
  TORCH_CHECK(copy, "the clone of a ", original.name(), " must not replace a ", name());
  *this = *copy;
}

void GroupedQueryAttentionImpl::drop_bias(const std::string& projection) {
  for (const auto& [name, linear] : {std::pair("q_proj", &q_proj), std::pair("k_proj", &k_proj),
                                     std::pair("v_proj", &v_proj), std::pair("o_proj", &o_proj)}) {
    if (projection != name) continue;
    const auto& old = *linear;
    const auto made = make_linear(old->options.in_features(), old->options.out_features(), false,
                                  old->weight.options().requires_grad(false));
    made->weight.set_data(old->weight.detach());
    *linear = replace_module(name, made);
    return;
  }
  TORCH_CHECK_VALUE(false, "projection must be q_proj, k_proj, v_proj or o_proj, got ", projection);
}

void GroupedQueryAttentionImpl::set_gate(const GateOptions& gate_options) {
  const auto tensors = o_proj->weight.options().requires_grad(false);
  const auto* groups = std::get_if<GroupGateOptions>(&gate_options);
  std::shared_ptr<GateImpl> bound;
  if (groups != nullptr) {
    bound = std::make_shared<GroupGateImpl>(*groups, options.embed_dim(), head_groups(), tensors);
  } else {
    bound = make_gate(gate_options, options.embed_dim(), options.num_heads(), tensors);
  }
  TORCH_CHECK_VALUE(!bound->reads_heads(),
                    "gate must choose by the layer's input, and this one reads queries and keys, "
                    "which a layer with a cache does not have of every head");
  bound->train(is_training());
  gate = gate ? replace_module("gate", bound) : register_module("gate", bound);
  options.gate(gate_options);
}

std::vector<int64_t> GroupedQueryAttentionImpl::head_groups() const {
  return options.key_value_heads() ? *options.key_value_heads()
                                   : even_groups(options.num_heads(), groups_);
}

void GroupedQueryAttentionImpl::check_call(const at::Tensor& x,
                                           const GroupedQueryArguments& call) const {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) == options.embed_dim(), "x must have shape [B, L, ",
                    options.embed_dim(), "], got ", x.sizes());
  const int64_t batch = x.size(0), length = x.size(1);
  if (call.memory.defined()) {
    const auto& m = call.memory;
    TORCH_CHECK_VALUE(m.dim() == 3 && m.size(0) == batch && m.size(2) == options.embed_dim(),
                      "memory must have shape [", batch, ", S, ", options.embed_dim(), "], got ",
                      m.sizes());
    TORCH_CHECK_VALUE(!call.is_causal && !call.cos.defined() && !call.sin.defined(),
                      "is_causal must be false and cos and sin undefined with memory: the "
                      "positions of another sequence are not those of the queries");
  }
  TORCH_CHECK_VALUE(call.cos.defined() == call.sin.defined(),
                    "cos and sin must be given together, or neither");
  for (const auto& [name, table] : {std::pair("cos", &call.cos), std::pair("sin", &call.sin)}) {
    if (!table->defined()) continue;
    const bool fits = table->dim() == 3 && (table->size(0) == 1 || table->size(0) == batch) &&
                      table->size(1) == length && table->size(2) <= head_dim_ &&
                      table->size(2) % 2 == 0 && table->size(2) == call.cos.size(-1);
    TORCH_CHECK_VALUE(fits, name, " must have shape [", batch, " or 1, ", length,
                      ", r] with one even r of at most ", head_dim_, ", got ", table->sizes());
  }
  const bool held = call.cache != nullptr && call.cache->size() > 0;
  TORCH_CHECK_VALUE(!held || call.cache->k.size(0) == batch, "cache must hold ", batch,
                    " sequences, as x, got ", held ? call.cache->k.size(0) : 0);
  const int64_t before = held ? call.cache->size() : 0;
  const int64_t keys = !call.memory.defined() ? before + length
                       : held                 ? before
                                              : call.memory.size(1);
  check_mask("key_padding_mask", call.key_padding_mask);
  check_mask("attn_mask", call.attn_mask);
  TORCH_CHECK_VALUE(!call.key_padding_mask.defined() ||
                        call.key_padding_mask.sizes() == at::IntArrayRef({batch, keys}),
                    "key_padding_mask must have shape [", batch, ", ", keys, "], got ",
                    call.key_padding_mask.sizes());
  const auto& padding = call.query_padding_mask;
  TORCH_CHECK_TYPE(!padding.defined() || padding.scalar_type() == at::kBool,
                   "query_padding_mask must be boolean, got ", padding.scalar_type());
  TORCH_CHECK_VALUE(!padding.defined() || padding.sizes() == at::IntArrayRef({batch, length}),
                    "query_padding_mask must have shape [", batch, ", ", length, "], got ",
                    padding.sizes());
  if (!call.attn_mask.defined()) return;
  const int64_t full[] = {batch, options.num_heads(), length, keys};
  bool fits = call.attn_mask.dim() <= 4;
  for (int64_t i = 1; fits && i <= call.attn_mask.dim(); ++i) {
    fits = call.attn_mask.size(-i) == 1 || call.attn_mask.size(-i) == full[4 - i];
  }
  TORCH_CHECK_VALUE(fits, "attn_mask must be broadcastable to ", at::IntArrayRef(full), ", got ",
                    call.attn_mask.sizes());
}

std::optional<Selection> GroupedQueryAttentionImpl::groups_read(const Selection* chosen,
                                                                bool cached) const {
  // A later step may choose others.
  if (chosen == nullptr || options.key_value_heads() || (cached && !options.keep_selection())) {
    return std::nullopt;
  }
  if (options.num_heads() == groups_) return *chosen;
  Selection groups = *chosen;
  std::tie(groups.index, groups.count) =
      select_groups(chosen->index, chosen->count, options.num_heads(), groups_);
  return groups;
}

at::Tensor GroupedQueryAttentionImpl::project(const torch::nn::Linear& linear, const at::Tensor& x,
                                              int64_t num_heads, const at::Tensor& norm,
                                              const Selection* chosen) const {
  const auto bias = optional(linear->bias);
  const auto heads = chosen != nullptr ? selected_projection(x, linear->weight, bias, num_heads,
                                                             chosen->index, chosen->count)
                                       : at::linear(x, linear->weight, bias)
                                             .view({x.size(0), x.size(1), num_heads, head_dim_})
                                             .transpose(1, 2);  // [B, heads, L, d]
  return norm.defined() ? at::rms_norm(heads, {head_dim_}, norm, options.qk_norm_eps()) : heads;
}

at::Tensor GroupedQueryAttentionImpl::for_each_head(const at::Tensor& shared) const {
  if (options.key_value_heads()) {
    return shared.index_select(
        1, torch::tensor(*options.key_value_heads(), at::kLong).to(shared.device()));
  }
  if (options.num_heads() == groups_) return shared;
  return shared.repeat_interleave(options.num_heads() / groups_, 1);
}

at::Tensor GroupedQueryAttentionImpl::attend_every(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v,
                                                   const AttentionArguments& masks) const {
  const bool even = !options.key_value_heads() && options.num_heads() != groups_;
  if (even && q.size(2) == 1 && same_for_all_heads(masks)) {
    // One query: the heads of a group are the rows of one product with its keys.
    const auto rows = q.reshape({q.size(0), groups_, options.num_heads() / groups_, head_dim_});
    return dense_attention(rows, k, v, masks).reshape(q.sizes());
  }
  if (even && !masks.key_padding_mask && !masks.attn_mask) {
    return at::scaled_dot_product_attention(q, k, v, {}, masks.dropout_p, masks.is_causal,
                                            masks.scale, /*enable_gqa=*/true);
  }
  return dense_attention(q, for_each_head(k), for_each_head(v), masks);
}

at::Tensor GroupedQueryAttentionImpl::attend_chosen(at::Tensor q, at::Tensor k, at::Tensor v,
                                                    const Selection& chosen,
                                                    AttentionArguments masks,
                                                    const at::Tensor& slots) const {
  auto index = chosen.index, count = chosen.count;
  const int64_t each = options.num_heads() / std::max<int64_t>(groups_, 1);
  if (options.key_value_heads()) {
    k = for_each_head(k);
    v = for_each_head(v);
  } else if (slots.defined()) {
    // The same attention, among the heads that read a slot.
    const auto of_slots = [&](const at::Tensor& heads) {
      return take_slots(heads.unflatten(1, {-1, each}), slots);
    };
    const auto ran = of_slots(selection_mask(index, count, q.scalar_type())) *
                     (slots >= 0).unsqueeze(-1);  // [B, K, H / Hkv]
    std::tie(index, count) = select_nonzero(ran.flatten(1));
    q = of_slots(q).flatten(1, 2);  // [B, K H / Hkv, L, d]
    if (!same_for_all_heads(masks)) {
      const auto& mask = *masks.attn_mask;
      masks.attn_mask =
          of_slots(mask.expand({q.size(0), options.num_heads(), mask.size(-2), mask.size(-1)}))
              .flatten(1, 2);
    }
  }
  if (masks.dropout_p > 0.0) {
    masks.dropout_seed = torch::randint(std::numeric_limits<int64_t>::max(), {1},
                                        q.options().dtype(at::kLong).requires_grad(false));
  }
  auto context = selected_attention(q, k, v, index, count, {}, masks);
  if (!slots.defined()) return context;
  return spread_slots(context.unflatten(1, {-1, each}), slots, groups_).flatten(1, 2);
}

std::tuple<at::Tensor, at::Tensor> GroupedQueryAttentionImpl::forward(
    const at::Tensor& x, const GroupedQueryArguments& call) {
  check_call(x, call);
  const int64_t length = x.size(1), heads = options.num_heads();
  const bool cross = call.memory.defined();
  // Stored when nothing can fail any more: after an error the cache is what it was.
  std::optional<KeyValueCache> draft;
  if (call.cache != nullptr) draft = *call.cache;
  KeyValueCache* cache = draft ? &*draft : nullptr;
  const auto stored = [&](at::Tensor output) {
    if (draft) *call.cache = std::move(*draft);
    return output;
  };
  KeyValueCache* keeping = options.keep_selection() ? cache : nullptr;
  at::Tensor padding = call.query_padding_mask;
  if (!padding.defined() && call.key_padding_mask.defined() && !cross) {
    padding = call.key_padding_mask.slice(1, call.key_padding_mask.size(1) - length);
  }

  std::optional<Selection> selection;
  at::Tensor slots;  // [B, K]
  if (gate && keeping != nullptr && keeping->selection) {
    selection = keeping->selection;
    slots = keeping->slots;
  } else if (gate) {
    TORCH_CHECK_VALUE(keeping == nullptr || keeping->size() == 0, "cache has ",
                      keeping == nullptr ? 0 : keeping->size(),
                      " tokens and no selection of heads for them: with keep_selection begin with "
                      "an empty one");
    selection = gate->forward(x, hidden_from_gate(x, padding, seen));
    if (keeping != nullptr && !is_training()) {
      if (const auto read = groups_read(&*selection, false)) {
        slots = slots_of(read->index, read->count).value_or(at::Tensor());
      }
    }
  }
  if (selection && on_selection && !recomputing()) on_selection(*selection);
  const bool every = !selection || (is_training() && gate->run_all());
  const Selection* chosen = every ? nullptr : &*selection;

  auto q = project(q_proj, x, heads, q_norm, chosen);  // [B, H, L, d]
  at::Tensor k, v;                                     // [B, Hkv or K, S, d]
  if (cross && cache != nullptr && cache->size() > 0) {
    k = cache->k;
    v = cache->v;
  } else {
    const auto groups = groups_read(chosen, cache != nullptr);
    const auto* read = groups ? &*groups : nullptr;
    const auto& tokens = cross ? call.memory : x;
    k = project(k_proj, tokens, groups_, k_norm, read);
    v = project(v_proj, tokens, groups_, {}, read);
    if (call.cos.defined()) {
      q = rotate_heads(q, call.cos, call.sin);
      k = rotate_heads(k, call.cos, call.sin);
    }
    if (slots.defined()) {
      k = take_slots(k, slots);
      v = take_slots(v, slots);
    }
    if (cache != nullptr) {
      // A layer without heads: callers count the tokens in caches, so they must be there.
      const auto token = [&](const at::Tensor& part) {
        return groups_ > 0 ? part : part.new_zeros({part.size(0), 1, part.size(2), 1});
      };
      std::tie(k, v) = cache->update(token(k), token(v));
      if (keeping != nullptr) {
        keeping->selection = selection;
        keeping->slots = slots;
      }
    }
  }
  if (groups_ == 0) k = v = k.new_zeros({k.size(0), 0, k.size(2), head_dim_});
  if (slots.defined() && (chosen == nullptr || call.need_weights)) {
    k = spread_slots(k, slots, groups_);
    v = spread_slots(v, slots, groups_);
    slots = at::Tensor();
  }

  AttentionArguments masks;
  masks.key_padding_mask = optional(call.key_padding_mask);
  masks.attn_mask = optional(call.attn_mask);
  masks.is_causal = call.is_causal;
  masks.scale = scale_;
  align_masks(masks, q, k, options.sliding_window());
  at::Tensor probabilities;  // [B, H, L, S]
  if (call.need_weights) {
    probabilities = attention_probabilities(q, for_each_head(k), masks);
    if (selection) {
      probabilities = probabilities * selection_mask(selection->index, selection->count,
                                                     probabilities.scalar_type())
                                          .unsqueeze(-1)
                                          .unsqueeze(-1);
    }
  }
  masks.dropout_p = is_training() ? options.dropout() : 0.0;
  const auto bias = optional(o_proj->bias);
  if (chosen == nullptr) {
    const auto weight = selection ? std::optional(selection->weight) : std::nullopt;
    return {stored(combine_heads(attend_every(q, k, v, masks), weight, o_proj->weight, bias)),
            probabilities};
  }
  return {stored(selected_output_projection(attend_chosen(q, k, v, *chosen, masks, slots),
                                            o_proj->weight, bias, chosen->index, chosen->count,
                                            chosen->weight)),
          probabilities};
}

GroupedLayers grouped_layers(torch::nn::Module& model) {
  GroupedLayers found;
  if (dynamic_cast<GroupedQueryAttentionImpl*>(&model) != nullptr) {
    found.emplace_back(
        "", std::dynamic_pointer_cast<GroupedQueryAttentionImpl>(model.shared_from_this()));
  }
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto layer = std::dynamic_pointer_cast<GroupedQueryAttentionImpl>(item.value())) {
      found.emplace_back(item.key(), GroupedQueryAttention(std::move(layer)));
    }
  }
  return found;
}

GatesSee::GatesSee(GroupedLayers layers, const at::Tensor& tokens) : layers_(std::move(layers)) {
  TORCH_CHECK_VALUE(!layers_.empty(), "layers must not be empty");
  for (auto& [name, layer] : layers_) before_.push_back(std::exchange(layer->seen, tokens));
}

GatesSee::~GatesSee() {
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].second->seen = before_[i];
}

GatesSee gates_see(GroupedLayers layers, const at::Tensor& tokens) {
  TORCH_CHECK_TYPE(tokens.scalar_type() == at::kBool, "tokens must be boolean or a number, got ",
                   tokens.scalar_type());
  TORCH_CHECK_VALUE(tokens.dim() == 2, "tokens must have shape [B, L], got ", tokens.sizes());
  return GatesSee(std::move(layers), tokens);
}

GatesSee gates_see(GroupedLayers layers, int64_t tokens) {
  TORCH_CHECK_VALUE(tokens > 0, "tokens must be positive, got ", tokens);
  return GatesSee(std::move(layers), torch::tensor(tokens, at::kLong));
}

}  // namespace headwise

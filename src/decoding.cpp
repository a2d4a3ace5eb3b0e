#include "decoding.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "attention_masks.h"
#include "ops/attention_ops.h"
#include "ops/select_heads.h"

namespace headwise {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// slots [B, K] with the dimensions of `like` [B, ., ...] behind them.
at::Tensor behind(const at::Tensor& slots, const at::Tensor& like) {
  at::Tensor wide = slots;
  for (int64_t i = 2; i < like.dim(); ++i) wide = wide.unsqueeze(-1);
  return wide;
}

/// The slots' groups as an index into dimension 1 of `like`.
at::Tensor place_of(const at::Tensor& slots, const at::Tensor& like) {
  auto sizes = like.sym_sizes().vec();
  sizes[1] = slots.sym_size(1);
  return behind(slots.clamp_min(0), like).expand_symint(sizes);
}

void check_slots(const char* name, const at::Tensor& held, const at::Tensor& slots) {
  TORCH_CHECK_VALUE(held.dim() >= 2, name, " must have shape [B, ., ...], got ", held.dim(),
                    " dimensions");
  TORCH_CHECK_TYPE(slots.scalar_type() == at::kLong, "slots must be int64, got ",
                   slots.scalar_type());
  TORCH_CHECK_VALUE(slots.dim() == 2 && slots.sym_size(0) == held.sym_size(0),
                    "slots must have shape [", held.sym_size(0), ", K], got ", slots.sym_sizes());
}

}  // namespace

// Sizes are read as SymInt where torch.compile and torch.export trace with dynamic ones.

at::Tensor rotate_heads(const at::Tensor& heads, const at::Tensor& cos, const at::Tensor& sin,
                        bool neighbours) {
  TORCH_CHECK_VALUE(heads.dim() == 4 && cos.dim() == 3 && sin.dim() == 3,
                    "heads must have shape [B, H, L, d], and cos and sin [B or 1, L, r], got ",
                    heads.dim(), ", ", cos.dim(), " and ", sin.dim(), " dimensions");
  const auto width = cos.sym_size(2), all = heads.sym_size(3);
  TORCH_CHECK_VALUE(width <= all && width % 2 == 0 && sin.sym_size(2) == width,
                    "cos and sin must have one even width of at most ", all, ", got ", width,
                    " and ", sin.sym_size(2));
  const bool whole = width == all;
  const auto turned = whole ? heads : heads.narrow_symint(3, 0, width);
  at::Tensor other;  // what the sine multiplies
  if (neighbours) {
    const auto pairs = turned.unflatten_symint(3, {width / 2, 2});
    other = at::stack({-pairs.select(4, 1), pairs.select(4, 0)}, 4).flatten(3);
  } else {
    other = at::cat(
        {-turned.narrow_symint(3, width / 2, width / 2), turned.narrow_symint(3, 0, width / 2)}, 3);
  }
  auto rotated = turned * cos.unsqueeze(1) + other * sin.unsqueeze(1);
  if (whole) return rotated;
  return at::cat({rotated, heads.narrow_symint(3, width, all - width)}, 3);
}

at::Tensor causal_mask(const at::Tensor& q, const at::Tensor& k,
                       const std::optional<at::Tensor>& attn_mask,
                       std::optional<c10::SymInt> window) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4,
                    "q must have shape [B, H, L, d] and k [B, Hkv, S, d], got ", q.dim(), " and ",
                    k.dim(), " dimensions");
  const auto length = q.sym_size(2), keys = k.sym_size(2);
  TORCH_CHECK_VALUE(length <= keys, "q must not be longer than k, which has ", keys, " keys, got ",
                    length);
  const auto integers = at::TensorOptions().dtype(at::kLong).device(q.device());
  const auto position = at::arange(keys - length, keys, integers).unsqueeze(1);  // [L, 1]
  const auto key = at::arange(keys, integers);                                   // [S]
  auto unseen = key > position;                                                  // [L, S]
  if (window) unseen = unseen | (key <= position - *window);
  if (!attn_mask) return unseen;
  check_mask("attn_mask", *attn_mask);
  return attn_mask->scalar_type() == at::kBool ? *attn_mask | unseen
                                               : attn_mask->masked_fill(unseen, -kInfinity);
}

void align_masks(AttentionArguments& masks, const at::Tensor& q, const at::Tensor& k,
                 std::optional<int64_t> window) {
  const int64_t length = q.size(2), keys = k.size(2);
  if (window && *window >= keys) window = std::nullopt;
  if (!masks.is_causal || (length == 1 && !window)) {
    masks.is_causal = false;
  } else if (length != keys || window || masks.attn_mask) {
    masks.is_causal = false;
    masks.attn_mask = causal_mask(q, k, masks.attn_mask, window);
  }
}

at::Tensor hide_tokens(const at::Tensor& x, const std::optional<at::Tensor>& padding,
                       const std::optional<at::Tensor>& seen, std::optional<int64_t> first) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have shape [B, L, D], got ", x.dim(), " dimensions");
  TORCH_CHECK_VALUE(seen.has_value() != first.has_value(), "seen or first must be given, not both");
  const auto batch = x.sym_size(0), length = x.sym_size(1);
  at::Tensor hidden;
  if (!padding) {
    hidden =
        at::zeros_symint({batch, length}, at::TensorOptions().dtype(at::kBool).device(x.device()));
  } else {
    hidden = padding->scalar_type() == at::kBool ? *padding : padding->eq(-kInfinity);
  }
  if (first) return hidden | hidden.logical_not().cumsum(1).gt(*first);
  TORCH_CHECK_TYPE(seen->scalar_type() == at::kBool, "tokens of gates_see must be boolean, got ",
                   seen->scalar_type());
  TORCH_CHECK_VALUE(seen->dim() == 2 && seen->sym_size(0) == batch && seen->sym_size(1) == length,
                    "tokens of gates_see must have shape [", batch, ", ", length,
                    "], as the layer's input, got ", seen->sym_sizes());
  return hidden | seen->to(x.device()).logical_not();
}

std::optional<at::Tensor> slots_of(const at::Tensor& index, const at::Tensor& count) {
  ops::check_selection_mask(index, count);
  if (index.is_cpu()) {
    ops::check_selection_values(index, count, std::numeric_limits<int32_t>::max());
  }
  if (index.numel() == 0) return std::nullopt;
  const int64_t most = std::max<int64_t>(count.max().item<int64_t>(), 1);
  TORCH_CHECK_VALUE(most <= index.size(1), "count must be at most ", index.size(1), ", got ", most);
  if (most == index.size(1)) return std::nullopt;
  return index.narrow(1, 0, most).to(at::kLong);
}

at::Tensor take_slots(const at::Tensor& groups, const at::Tensor& slots) {
  check_slots("groups", groups, slots);
  return groups.gather(1, place_of(slots, groups));
}

at::Tensor spread_slots(const at::Tensor& held, const at::Tensor& slots, int64_t num_groups) {
  check_slots("held", held, slots);
  TORCH_CHECK_VALUE(slots.sym_size(1) == held.sym_size(1), "slots must have ", held.sym_size(1),
                    " columns, as held, got ", slots.sym_size(1));
  ops::check_heads(num_groups, "num_groups");
  auto sizes = held.sym_sizes().vec();
  sizes[1] = num_groups;
  return at::zeros_symint(sizes, held.options().requires_grad(false))
      .scatter_add(1, place_of(slots, held), held.masked_fill(behind(slots < 0, held), 0.0));
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("rotate_heads", rotate_heads);
  m.impl("causal_mask", causal_mask);
  m.impl("hide_tokens", hide_tokens);
  m.impl("slots_of", slots_of);
  m.impl("take_slots", take_slots);
  m.impl("spread_slots", spread_slots);
}

}  // namespace headwise

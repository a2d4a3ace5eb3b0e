#include "decoding.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

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
  auto sizes = like.sizes().vec();
  sizes[1] = slots.size(1);
  return behind(slots.clamp_min(0), like).expand(sizes);
}

}  // namespace

at::Tensor rotate_heads(const at::Tensor& heads, const at::Tensor& cos, const at::Tensor& sin) {
  const auto width = cos.size(-1);
  const auto turned = heads.narrow(-1, 0, width);
  const auto halves = turned.chunk(2, -1);
  const auto rotated =
      turned * cos.unsqueeze(1) + at::cat({-halves[1], halves[0]}, -1) * sin.unsqueeze(1);
  if (width == heads.size(-1)) return rotated;
  return at::cat({rotated, heads.narrow(-1, width, heads.size(-1) - width)}, -1);
}

void align_masks(AttentionArguments& masks, int64_t length, int64_t keys,
                 std::optional<int64_t> window, const at::Device& device) {
  const bool narrow = window && *window < keys;
  if (!masks.is_causal || (length == 1 && !narrow)) {
    masks.is_causal = false;
    return;
  }
  if (length == keys && !narrow && !masks.attn_mask) return;
  masks.is_causal = false;
  const auto position = at::arange(keys - length, keys, device).unsqueeze(1);  // [L, 1]
  const auto key = at::arange(keys, device);                                   // [S]
  auto unseen = key > position;                                                // [L, S]
  if (narrow) unseen = unseen | (key <= position - *window);
  if (!masks.attn_mask) {
    masks.attn_mask = unseen;
  } else if (masks.attn_mask->scalar_type() == at::kBool) {
    masks.attn_mask = *masks.attn_mask | unseen;
  } else {
    masks.attn_mask = masks.attn_mask->masked_fill(unseen, -kInfinity);
  }
}

at::Tensor hide_tokens(const at::Tensor& padding, const at::Tensor& seen, const at::Tensor& x) {
  if (!seen.defined()) return padding;
  at::Tensor hidden = padding;
  if (!padding.defined()) {
    hidden = at::zeros({x.size(0), x.size(1)}, x.options().dtype(at::kBool).requires_grad(false));
  } else if (padding.scalar_type() != at::kBool) {
    hidden = padding.eq(-kInfinity);
  }
  if (seen.dim() == 0) return hidden | hidden.logical_not().cumsum(1).gt(seen.item());
  TORCH_CHECK_VALUE(seen.sizes() == at::IntArrayRef({x.size(0), x.size(1)}),
                    "tokens of gates_see must have shape [", x.size(0), ", ", x.size(1),
                    "], as the layer's input, got ", seen.sizes());
  return hidden | seen.to(x.device()).logical_not();
}

at::Tensor slots_of(const at::Tensor& index, const at::Tensor& count) {
  if (index.numel() == 0) return {};
  const int64_t most = std::max<int64_t>(count.max().item<int64_t>(), 1);
  return most == index.size(1) ? at::Tensor() : index.narrow(1, 0, most).to(at::kLong);
}

at::Tensor take_slots(const at::Tensor& groups, const at::Tensor& slots) {
  return groups.gather(1, place_of(slots, groups));
}

at::Tensor spread_slots(const at::Tensor& held, const at::Tensor& slots, int64_t num_groups) {
  auto sizes = held.sizes().vec();
  sizes[1] = num_groups;
  return at::zeros(sizes, held.options().requires_grad(false))
      .scatter_add(1, place_of(slots, held), held.masked_fill(behind(slots < 0, held), 0.0));
}

}  // namespace headwise

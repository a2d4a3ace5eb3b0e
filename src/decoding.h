// What decoders do around the operators: rotated positions, aligned masks, caches of chosen groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "headwise/attention.h"

namespace headwise {

/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of heads [B, H, L, d] by cos and
/// sin [B or 1, L, r], r <= d even: feature i of the first r turns with feature i + r / 2.
at::Tensor rotate_heads(const at::Tensor& heads, const at::Tensor& cos, const at::Tensor& sin);

/// Masks of a call on `length` queries at the positions of the last of `keys` keys, as the
/// operators take them: their causal flag aligns the first query with the first key. window: a
/// query sees the last `window` keys, its own among them.
void align_masks(AttentionArguments& masks, int64_t length, int64_t keys,
                 std::optional<int64_t> window, const at::Device& device);

/// Tokens hidden from a gate, bool [B, L] or undefined: padding (bool, or floating with -inf, or
/// undefined), and those that gates_see excludes: `seen` is bool [B, L], an integer [] for the
/// first tokens that are not padding, or undefined.
at::Tensor hide_tokens(const at::Tensor& padding, const at::Tensor& seen, const at::Tensor& x);

/// The groups that each sequence keeps, int64 [B, K], ascending, then -1; undefined if some
/// sequence keeps all. The host must know K: this waits for the device.
/// @param index, count  int32 [B, G] and [B], a selection of groups
at::Tensor slots_of(const at::Tensor& index, const at::Tensor& count);

/// [B, G, ...] -> [B, K, ...]; a slot of -1 gets values that must not be read.
at::Tensor take_slots(const at::Tensor& groups, const at::Tensor& slots);

/// [B, K, ...] -> [B, G, ...], zeros in the groups without a slot.
at::Tensor spread_slots(const at::Tensor& held, const at::Tensor& slots, int64_t num_groups);

}  // namespace headwise

// What decoders do around the operators: rotated positions, aligned masks, caches of chosen groups.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>

#include "headwise/attention.h"

namespace headwise {

// Operators for Python, too (torch.ops.headwise): composites, which run wherever ATen runs.

/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of heads [B, H, L, d] by cos and
/// sin [B or 1, L, r], r <= d even: feature i of the first r turns with feature i + r / 2, or with
/// `neighbours` feature 2i with feature 2i + 1.
at::Tensor rotate_heads(const at::Tensor& heads, const at::Tensor& cos, const at::Tensor& sin,
                        bool neighbours = false);

/// `attn_mask`, if there is one, with -inf or true for the keys that queries q [B, H, L, d] at the
/// positions of the last of the keys k [B, Hkv, S, d] must not see: later ones, and those before
/// the last `window`, the query's own among them. Otherwise bool [L, S].
at::Tensor causal_mask(const at::Tensor& q, const at::Tensor& k,
                       const std::optional<at::Tensor>& attn_mask,
                       std::optional<c10::SymInt> window);

/// Masks of a call on queries q [B, H, L, d] at the positions of the last of the keys k, as the
/// operators take them: their causal flag aligns the first query with the first key. No operator,
/// because torch.export cannot store the flag among its results: Python repeats this rule
/// (headwise.nn.decoder_inputs.align).
void align_masks(AttentionArguments& masks, const at::Tensor& q, const at::Tensor& k,
                 std::optional<int64_t> window);

/// Tokens hidden from a gate, bool [B, L]: padding (bool, or floating with -inf), and those that
/// gates_see excludes: what is not `seen`, bool [B, L], or comes after the `first` tokens that are
/// not padding. x [B, L, D] is the layer's input.
at::Tensor hide_tokens(const at::Tensor& x, const std::optional<at::Tensor>& padding,
                       const std::optional<at::Tensor>& seen, std::optional<int64_t> first);

/// The groups that each sequence keeps, int64 [B, K], ascending, then -1; none if some sequence
/// keeps all. The host must know K: this waits for the device.
/// @param index, count  int32 [B, G] and [B], a selection of groups
std::optional<at::Tensor> slots_of(const at::Tensor& index, const at::Tensor& count);

/// [B, G, ...] -> [B, K, ...]; a slot of -1 gets values that must not be read.
at::Tensor take_slots(const at::Tensor& groups, const at::Tensor& slots);

/// [B, K, ...] -> [B, G, ...], zeros in the groups without a slot.
at::Tensor spread_slots(const at::Tensor& held, const at::Tensor& slots, int64_t num_groups);

}  // namespace headwise

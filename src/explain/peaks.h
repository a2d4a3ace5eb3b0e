// Where heads attend: the strongest key of every query, without the attention map, and how often it
// is the one that a role predicts. torch.ops.headwise has these operators by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace headwise {

/// The strongest key of every query and its attention probability. Memory beyond the result does
/// not grow with L: queries are processed in blocks.
/// q [B, H, L, d], k [B, H, S, d]; masks as attention_probabilities takes them, over the S keys;
/// excluded bool [B, S]: keys that are never reported (separators, for example); probabilities
/// still count all visible keys.
/// -> {key int32 [B, H, L], -1 where a query sees none; weight [B, H, L], at least float32}
std::tuple<at::Tensor, at::Tensor> attention_peaks(
    const at::Tensor& q, const at::Tensor& k,
    const std::optional<at::Tensor>& key_padding_mask = {},
    const std::optional<at::Tensor>& attn_mask = {}, bool is_causal = false,
    const std::optional<at::Tensor>& excluded = {}, std::optional<double> scale = {});

/// How often the strongest key of a query is an expected one. A trial (b, f, i, j) asks, for
/// sequence b and question f, whether the strongest key of query i is in the same group as key j
/// (the tokens of a word, for example); with `others_only`, query i itself does not count.
/// key int [B, H, L], trials int64 [T, 4], group int64 [B, S]
/// -> {hits int32 [B, H, F], trials int32 [B, F]}
std::tuple<at::Tensor, at::Tensor> peak_hits(const at::Tensor& key, const at::Tensor& trials,
                                             const at::Tensor& group, int64_t questions,
                                             bool others_only = false);

}  // namespace headwise

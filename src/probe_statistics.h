// Attention statistics from a probe.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "headwise/multihead_attention.h"

namespace headwise {

/// bool, true = padding, of a boolean or floating mask.
at::Tensor is_padding(const at::Tensor& mask);

/// Entropy and confidence of every head, [B, H] each, in O(L) memory a head.
std::tuple<at::Tensor, at::Tensor> probe_statistics(const AttentionProbe& probe);

}  // namespace headwise

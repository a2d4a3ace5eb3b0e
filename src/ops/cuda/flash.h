// LibTorch's FlashAttention instead of the kernels of attention.h, for calls in which both compute
// the same: its form for rows of many lengths, with each chosen pair as a sequence of one head. It
// is enabled by set_cuda_routes() (headwise/backends.h). Its lse has the layout of the kernels'
// own, so either may run the backward of the other's forward. Its backward accumulates with
// atomics: gradients of q differ in their last digits from run to run, unless
// torch.use_deterministic_algorithms() is set.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace headwise::ops::device {

/// True if LibTorch takes heads of this dtype and width, `pairs` of them, with this many rows each.
inline bool flash_takes(at::ScalarType type, int64_t pairs, int64_t rows, int64_t width) {
  // Pairs are the second dimension of its grid, and it counts rows in 32 bits.
  constexpr int64_t kMostPairs = 65535, kWidest = 256;
  return (type == at::kHalf || type == at::kBFloat16) && width > 0 && width % 8 == 0 &&
         width <= kWidest && rows > 0 && pairs > 0 && pairs <= kMostPairs &&
         pairs * rows <= std::numeric_limits<int32_t>::max();
}

/// Sequence i of `q` [rows, 1, d] begins at row begins_q[i] and ends where the next one begins; of
/// k and v it begins at begins_k[i] and has keys_used[i] keys, if given. No sequence is longer than
/// `queries` and `keys`. Without keys the context is zero. -> context [rows, 1, d], lse in a shape
/// of LibTorch's.
struct FlashShape {
  at::Tensor begins_q, begins_k;  // int32 [N + 1]
  int64_t queries, keys;
  bool causal;
  double scale;
};
std::tuple<at::Tensor, at::Tensor> flash_forward(const at::Tensor& q, const at::Tensor& k,
                                                 const at::Tensor& v, const FlashShape& shape,
                                                 const std::optional<at::Tensor>& keys_used);
/// lse [rows]. Gradients of q, k and v.
std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_backward(
    const at::Tensor& grad_context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& context, const at::Tensor& lse, const FlashShape& shape);

}  // namespace headwise::ops::device

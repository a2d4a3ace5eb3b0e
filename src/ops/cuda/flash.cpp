#include "ops/cuda/flash.h"

#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>

namespace headwise::ops::device {

using at::Tensor;

std::tuple<Tensor, Tensor> flash_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const FlashShape& shape,
                                         const std::optional<Tensor>& keys_used) {
  auto result = at::_flash_attention_forward(
      q, k, v, shape.begins_q, shape.begins_k, shape.queries, shape.keys, /*dropout_p=*/0.0,
      shape.causal, /*return_debug_mask=*/false, shape.scale, /*window_size_left=*/std::nullopt,
      /*window_size_right=*/std::nullopt, keys_used, /*alibi_slopes=*/std::nullopt);
  return {std::get<0>(result), std::get<1>(result)};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& grad_context, const Tensor& q,
                                                  const Tensor& k, const Tensor& v,
                                                  const Tensor& context, const Tensor& lse,
                                                  const FlashShape& shape) {
  // The state of a generator, read only with dropout.
  const auto state = at::empty({2}, q.options().dtype(at::kUInt64));
  return at::_flash_attention_backward(grad_context, q, k, v, context, lse.view({1, -1}),
                                       shape.begins_q, shape.begins_k, shape.queries, shape.keys,
                                       /*dropout_p=*/0.0, shape.causal, state, state, shape.scale);
}

}  // namespace headwise::ops::device

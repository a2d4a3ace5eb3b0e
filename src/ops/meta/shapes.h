// What the Meta kernels return: tensors of a shape, without values. Sizes stay symbolic.
#pragma once

#include <ATen/ATen.h>

#include "ops/attention_ops.h"

namespace headwise::ops::meta {

inline at::Tensor empty(const at::Tensor& like, c10::SymIntArrayRef sizes) {
  return at::empty_symint(sizes, like.options());
}

/// A contiguous gradient of `input`, or no elements where it is not wanted.
inline at::Tensor gradient(bool wanted, const OptionalTensor& input, const at::Tensor& reference) {
  if (!wanted || !input) return at::empty({0}, reference.options());
  return empty(*input, input->sym_sizes());
}

}  // namespace headwise::ops::meta

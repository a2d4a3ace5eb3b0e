// What the Meta kernels return: tensors of a shape, without values. Sizes stay symbolic.
#pragma once

#include <ATen/ATen.h>

#include "ops/input_tensors.h"

namespace headwise::ops::meta {

inline at::Tensor empty(const at::Tensor& like, c10::SymIntArrayRef sizes) {
  return at::empty_symint(sizes, like.options());
}

/// A contiguous gradient of `input`, or no elements where it is not wanted.
inline at::Tensor gradient(bool wanted, const OptionalTensor& input, const at::Tensor& reference) {
  if (!wanted || !input) return at::empty({0}, reference.options());
  return empty(*input, input->sym_sizes());
}

/// Results of a backward operator. `reference` gives those that are not wanted their dtype.
template <typename Inputs, size_t N>
auto gradients(const Inputs& in, const std::array<bool, N>& needs, const at::Tensor& reference) {
  const auto inputs = differentiable(in);
  std::array<at::Tensor, N> results;
  for (size_t i = 0; i < N; ++i) results[i] = gradient(needs[i], inputs[i], reference);
  return std::tuple_cat(results);
}

/// Output of a layer, and what its backward reads: `slots` heads per sequence, in dtype `saved`.
inline LayerForward layer_forward(const at::Tensor& query, const c10::SymInt& keys,
                                  const c10::SymInt& slots, const at::Tensor& out_weight,
                                  int64_t num_heads, at::ScalarType saved) {
  const auto batch = query.sym_size(0), queries = query.sym_size(1),
             d = num_heads ? out_weight.sym_size(1) / num_heads : c10::SymInt(0);
  const auto of = [&](c10::SymIntArrayRef sizes, at::ScalarType type) {
    return at::empty_symint(sizes, query.options().dtype(type));
  };
  return {empty(query, {batch, queries, out_weight.sym_size(0)}),
          of({batch, slots, queries, d}, saved),
          of({batch, slots, keys, d}, saved),
          of({batch, slots, keys, d}, saved),
          of({batch, slots, queries, d}, saved),
          of({batch, slots, queries}, lse_type(query.scalar_type()))};
}

}  // namespace headwise::ops::meta

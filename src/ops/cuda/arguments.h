// From tensors to the arguments of kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/cuda/attention.h"
#include "ops/attention_ops.h"

namespace headwise::ops::device {

using kernels::cuda::Chosen;
using kernels::cuda::PairAttentionArguments;
using kernels::cuda::Rows;
using kernels::cuda::Units;

/// A selection in device memory, cleaned and listed. `chosen` points into the tensors.
struct Selected {
  at::Tensor lists;        ///< int32, everything that `chosen` points to
  at::Tensor packed_head;  ///< int32 [B * K], a view: the head of each row of packed buffers, or -1
  at::Tensor begins, used;  ///< int32 [B K + 1] and [B H], views; where `length` was given
  Chosen chosen{};
};
/// With `length`, rows of a pair, also what flash.h wants.
Selected select(const at::Tensor& index, const at::Tensor& count, int64_t num_heads,
                int64_t length = 0);

/// Masks, dropout and scale in the form that the kernels take. Holds what the arguments point to.
struct Masks {
  at::Tensor key, attention, limit, seed;
  void apply(PairAttentionArguments& a) const;
  const int32_t* limits() const;

  Masks(const AttentionArguments& arguments, at::ScalarType type, at::Device device, int64_t batch,
        int64_t num_heads, int64_t queries, int64_t keys);

 private:
  PairAttentionArguments prepared_{};
};

/// `t` with elements of the last dimension next to each other.
at::Tensor dense_rows(const at::Tensor& t);
/// [B, R, w], by dense_rows().
Rows rows(const at::Tensor& t);
/// [B, U, R, w], by dense_rows().
Units units(const at::Tensor& t);
/// Buffers [B, K, R, d] that hold packed rows [B * K, R, d].
Units packed_units(const at::Tensor& t);
/// True if every row begins at an address that is a multiple of 16 bytes.
bool aligned(const at::Tensor& t);

}  // namespace headwise::ops::device

// The order that top-k selection follows, for the host and for the device.
#pragma once

#include <cstdint>

#include "kernels/host_device.h"

namespace headwise::kernels {

/// True if head i (relevance a) is chosen before head j (relevance b): the larger relevance first,
/// a tie goes to the lower head, NaN comes after every number.
template <typename T>
HEADWISE_HOST_DEVICE bool outranks(T a, int64_t i, T b, int64_t j) {
  const bool a_nan = a != a;
  const bool b_nan = b != b;
  if (a_nan || b_nan) return a_nan == b_nan ? i < j : b_nan;
  return a > b || (a == b && i < j);
}

/// Number of heads chosen before head h of a row: it is among the top k if and only if this is < k.
/// Quadratic in the number of heads over a row, which for tens of heads beats any sort, and gives
/// every head its answer independently of the others.
template <typename Load>
HEADWISE_HOST_DEVICE int64_t selection_rank(const Load& relevance, int64_t h, int64_t num_heads) {
  const auto own = relevance(h);
  int64_t rank = 0;
  for (int64_t j = 0; j < num_heads; ++j) rank += outranks(relevance(j), j, own, h) ? 1 : 0;
  return rank;
}

/// A count as the device reads it: out-of-range values, which only the host reports, are clamped.
HEADWISE_HOST_DEVICE int64_t clamp_count(int64_t count, int64_t num_heads) {
  return count < 0 ? 0 : (count > num_heads ? num_heads : count);
}

}  // namespace headwise::kernels

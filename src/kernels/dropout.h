// The dropout mask of the attention operators, the same on every device: a counter-based generator,
// so backward draws the mask again instead of storing it.
#pragma once

#include <cstdint>

#include "kernels/host_device.h"

namespace headwise::kernels {

/// 32 uniform bits for element `counter` of the stream `seed`: the finalizer of SplitMix64 (Steele,
/// Lea and Flood, 2014, 'Fast splittable pseudorandom number generators', figure 16) applied to
/// seed + counter * 0x9e3779b97f4a7c15, upper half.
HEADWISE_HOST_DEVICE uint32_t counter_bits(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

/// The position of probability (b, h, i, j) in the stream; `keys` counts the given keys and the
/// added rows, and the added rows come last whatever the padding.
HEADWISE_HOST_DEVICE uint64_t dropout_counter(int64_t b, int64_t h, int64_t i, int64_t j,
                                              int64_t num_heads, int64_t queries, int64_t keys) {
  return ((static_cast<uint64_t>(b) * num_heads + h) * queries + i) * keys + j;
}

/// An element is kept when its bits are below this: each is kept, independently, with probability
/// 1 - p (to within 2^-32), and what is kept is multiplied by 1 / (1 - p).
HEADWISE_HOST_DEVICE uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>((1.0 - p) * 4294967296.0);
}

}  // namespace headwise::kernels

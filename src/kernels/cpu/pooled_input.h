// The mean of each sequence's tokens that are not padding: what gates see of a layer's input.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/memory.h"

namespace headwise::kernels {

template <typename T>
struct PooledInput {
  using C = std::conditional_t<std::is_same_v<T, double>, double, float>;  ///< of sums
  int64_t batch, rows, width;
  const T* x;  ///< [B, L, D], elements of a row consecutive
  int64_t x_batch, x_row;
  const bool* padding = nullptr;  ///< [B, L], true: padding; or null
  const C* added = nullptr;       ///< [B, L], a token counts exp(added), and 0 is padding; or null
  int64_t mask_batch = 0, mask_row = 0;
};

/// How many tasks add up the tokens of a sequence.
int64_t pooled_splits(int64_t rows);

/// The sums [D] over the tokens of one split of sequence b, then how many they are.
template <typename T>
void pool(const PooledInput<T>& in, int64_t b, int64_t split, typename PooledInput<T>::C* sums);

/// The sums [D + 1] of sequence b from those of its splits.
template <typename C>
void gather(const Scratch<C>& partial, int64_t b, int64_t splits, int64_t width, C* sums) {
  for (int64_t c = 0; c <= width; ++c) sums[c] = 0;
  for (int64_t split = 0; split < splits; ++split) {
    const C* const part = partial[b * splits + split];
    for (int64_t c = 0; c <= width; ++c) sums[c] += part[c];
  }
}

/// The means [B, D]. Results are the same for any number of threads.
template <typename T>
void pool_features(const PooledInput<T>& in, typename PooledInput<T>::C* means);

/// One more batch of features [B, D] in a gate's running statistics mean [D], variance [D] and
/// batches [1]: update_statistics(). A batch that is empty or not finite changes nothing.
template <typename C>
void learn_statistics(const C* features, int64_t batch, int64_t width, C* mean, C* variance,
                      float* batches);

/// inverse_spread() of n variances.
template <typename C>
void inverse_spreads(const C* variance, int64_t n, C* spreads);

/// features [B, D] in place: standardize().
template <typename C>
void standardize(C* features, int64_t batch, int64_t width, const C* mean, const C* variance);

}  // namespace headwise::kernels

#include "kernels/cpu/pooled_input.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/budget_gate.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kPooledRows = 256;  // tokens of a sequence that a task adds up
constexpr int kAdded = 8;             // rows added at a time

// Clones are of functions, so each type has its own; the template is inlined into them.

template <int N, typename T>
HEADWISE_INLINE void add_weighted(const T* const* x, const float* w, int64_t n, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Float16 sum, v;
    load(sums + c, sum);
    for (int i = 0; i < N; ++i) {
      load(x[i] + c, v);
      sum += v * w[i];
    }
    store(sums + c, sum);
  }
  for (; c < n; ++c)
    for (int i = 0; i < N; ++i) sums[c] += value(x[i] + c) * w[i];
}

/// The same for bfloat16, two of which are halves of a word: none has to be moved to its own.
template <int N>
HEADWISE_INLINE void add_weighted(const BFloat16* const* x, const float* w, int64_t n,
                                  float* sums) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
    Float16 even = {}, odd = {}, first, second;
    for (int i = 0; i < N; ++i) {
      Word16 words, part;
      std::memcpy(&words, x[i] + c, sizeof words);
      part = words << 16;
      std::memcpy(&first, &part, sizeof part);
      part = words & 0xffff0000u;
      std::memcpy(&second, &part, sizeof part);
      even += first * w[i];
      odd += second * w[i];
    }
    load(sums + c, first);
    load(sums + c + kLanes, second);
    first +=
        __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second += __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                      30, 15, 31);
    store(sums + c, first);
    store(sums + c + kLanes, second);
  }
  for (; c < n; ++c)
    for (int i = 0; i < N; ++i) sums[c] += value(x[i] + c) * w[i];
}

/// sums [n] += w[i] x[i] [n] over `rows` <= kAdded rows.
#define HEADWISE_ADD_ROWS(T)                                                               \
  HEADWISE_CLONES                                                                          \
  void add_rows(const T* const* x, const float* w, int64_t rows, int64_t n, float* sums) { \
    if (rows == kAdded) return add_weighted<kAdded>(x, w, n, sums);                        \
    for (int64_t i = 0; i < rows; ++i) add_weighted<1>(x + i, w + i, n, sums);             \
  }
HEADWISE_ADD_ROWS(float)
HEADWISE_ADD_ROWS(BFloat16)
HEADWISE_ADD_ROWS(Half)
#undef HEADWISE_ADD_ROWS
void add_rows(const double* const* x, const double* w, int64_t rows, int64_t n, double* sums) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < n; ++c) sums[c] += x[i][c] * w[i];
}

/// Sixteen values of inverse_spread(); those of zero and less, infinities and NaN are left as they
/// are and answered with false.
HEADWISE_INLINE bool spread_lanes(Float16& v) {
  Float16 x = v + 1e-4f;
  Int16 bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Positive and finite: the sign and the highest exponent are out of this range.
  const Int16 usable = (bits > 0) & (bits < 0x7f000000);  // true is -1
  if (lane_sum(__builtin_convertvector(usable, Float16)) != -kLanes) return false;
  bits = 0x5f3759df - (bits >> 1);
  Float16 root;
  std::memcpy(&root, &bits, sizeof root);
  for (int step = 0; step < 4; ++step) root = root * (1.5f - 0.5f * x * root * root);
  v = root;
  return true;
}
HEADWISE_CLONES
void inverse_spreads_of(const float* variance, int64_t n, float* spreads) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Float16 v;
    load(variance + c, v);
    if (spread_lanes(v))
      store(spreads + c, v);
    else
      for (int64_t i = c; i < c + kLanes; ++i) spreads[i] = inverse_spread(variance[i]);
  }
  for (; c < n; ++c) spreads[c] = inverse_spread(variance[c]);
}
void inverse_spreads_of(const double* variance, int64_t n, double* spreads) {
  for (int64_t c = 0; c < n; ++c) spreads[c] = inverse_spread(variance[c]);
}

// Batches that the running statistics remember.
constexpr double kMemory = 50.0;

}  // namespace

template <typename C>
void inverse_spreads(const C* variance, int64_t n, C* spreads) {
  inverse_spreads_of(variance, n, spreads);
}

int64_t pooled_splits(int64_t rows) { return std::max<int64_t>(1, blocks(rows, kPooledRows)); }

template <typename T>
void pool(const PooledInput<T>& in, int64_t b, int64_t split, typename PooledInput<T>::C* sums) {
  using C = typename PooledInput<T>::C;
  std::fill_n(sums, in.width + 1, C(0));
  const int64_t begin = split * kPooledRows, end = std::min(in.rows, begin + kPooledRows);
  const T* rows[kAdded];
  C weights[kAdded], tokens = 0;
  int64_t n = 0;
  for (int64_t l = begin; l < end; ++l) {
    const int64_t at = b * in.mask_batch + l * in.mask_row;
    C weight = 1;
    if (in.padding) weight = in.padding[at] ? C(0) : C(1);
    if (in.added) weight = std::exp(in.added[at]);
    if (weight == C(0)) continue;  // padding is not read
    tokens += weight;
    rows[n] = in.x + b * in.x_batch + l * in.x_row;
    weights[n] = weight;
    if (++n < kAdded) continue;
    add_rows(rows, weights, n, in.width, sums);
    n = 0;
  }
  add_rows(rows, weights, n, in.width, sums);
  sums[in.width] = tokens;
}

template <typename T>
void pool_features(const PooledInput<T>& in, typename PooledInput<T>::C* means) {
  using C = typename PooledInput<T>::C;
  const int64_t splits = pooled_splits(in.rows), D = in.width;
  Scratch<C> partial(D + 1, in.batch * splits);
  parallel_tasks(in.batch * splits, [&](int64_t task, int64_t) {
    pool(in, task / splits, task % splits, partial[task]);
  });
  std::vector<C> sums(D + 1);
  for (int64_t b = 0; b < in.batch; ++b) {
    gather(partial, b, splits, D, sums.data());
    const C inverse = inverse_tokens(sums[D]);
    for (int64_t c = 0; c < D; ++c) means[b * D + c] = sums[c] * inverse;
  }
}

template <typename C>
void learn_statistics(const C* features, int64_t batch, int64_t width, C* mean, C* variance,
                      float* batches) {
  if (batch == 0) return;
  std::vector<double> sum(width), square(width);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < width; ++c) {
      const double value = features[b * width + c];
      sum[c] += value;
      square[c] += value * value;
    }
  const double n = static_cast<double>(batch);
  for (int64_t c = 0; c < width; ++c) {
    sum[c] /= n;
    square[c] = std::max(square[c] / n - sum[c] * sum[c], 0.0);
    if (!std::isfinite(static_cast<C>(sum[c])) || !std::isfinite(static_cast<C>(square[c]))) return;
  }
  const float seen = *batches + 1;
  const C share = static_cast<C>(std::max(1.0f / seen, static_cast<float>(1.0 / kMemory)));
  for (int64_t c = 0; c < width; ++c) {
    const C step = static_cast<C>(sum[c]) - mean[c];
    // Of the mixture of what was seen before and this batch.
    variance[c] = variance[c] * (1 - share) + static_cast<C>(square[c]) * share +
                  step * step * (share * (1 - share));
    mean[c] += step * share;
  }
  *batches = seen;
}

template <typename C>
void standardize(C* features, int64_t batch, int64_t width, const C* mean, const C* variance) {
  std::vector<C> spread(width);
  inverse_spreads(variance, width, spread.data());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < width; ++c)
      features[b * width + c] = (features[b * width + c] - mean[c]) * spread[c];
}

#define HEADWISE_INSTANTIATE(T)                                                             \
  template void pool(const PooledInput<T>&, int64_t, int64_t, typename PooledInput<T>::C*); \
  template void pool_features(const PooledInput<T>&, typename PooledInput<T>::C*);
HEADWISE_INSTANTIATE(double)
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
HEADWISE_INSTANTIATE(Half)
#undef HEADWISE_INSTANTIATE
#define HEADWISE_INSTANTIATE(C)                                               \
  template void learn_statistics(const C*, int64_t, int64_t, C*, C*, float*); \
  template void inverse_spreads(const C*, int64_t, C*);                       \
  template void standardize(C*, int64_t, int64_t, const C*, const C*);
HEADWISE_INSTANTIATE(double)
HEADWISE_INSTANTIATE(float)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/softmax_row.h"

namespace headwise::kernels::cuda {
namespace {

/// Masks of query i and key j on a score.
template <typename C>
HEADWISE_DEVICE C masked(const StatisticsArguments& a, const StatisticsTile& tile, int64_t i,
                         int64_t j, C score) {
  bool hidden = j >= a.keys || (a.causal && j > i);
  if (hidden) return -std::numeric_limits<C>::infinity();
  if (a.key_forbid) hidden = a.key_forbid[tile.b * a.keys + j];
  if (a.key_add) score += static_cast<const C*>(a.key_add)[tile.b * a.keys + j];
  const int64_t at = tile.b * a.mask_stride[0] + tile.h * a.mask_stride[1] + i * a.mask_stride[2] +
                     j * a.mask_stride[3];
  if (a.mask_forbid) hidden |= a.mask_forbid[at];
  if (a.mask_add) score += static_cast<const C*>(a.mask_add)[at];
  return hidden ? -std::numeric_limits<C>::infinity() : score;
}

// Q and K pass through shared memory in pieces of kTileWidth columns, so that any head width fits;
// scores live in registers, kTileKeys / kLanes per thread.
template <typename T>
struct StatisticsKernel {
  using C = Accumulator<T>;
  static constexpr int kThreads = kStatisticsThreads, kOwn = kTileKeys / kLanes,
                       kStride = kTileWidth + 1;
  static constexpr int64_t kShared =
      kTileRows * 2 * sizeof(double) + (kTileRows + kTileKeys) * kStride * sizeof(C);
  StatisticsArguments a;

  HEADWISE_DEVICE void operator()() const {
    double* const row_sums = reinterpret_cast<double*>(shared_memory());  // [kTileRows][2]
    C* const q_tile = reinterpret_cast<C*>(row_sums + 2 * kTileRows);     // [kTileRows][kStride]
    C* const k_tile = q_tile + kTileRows * kStride;                       // [kTileKeys][kStride]
    const auto tile = statistics_tile(block_index(), a.num_heads, a.queries);
    const int thread = thread_index(), row = thread / kLanes, lane = thread % kLanes;
    const int64_t i = tile.first_row + row;
    const T* const q = static_cast<const T*>(a.q) + tile.b * a.q_stride[0] + tile.h * a.q_stride[1];
    const int64_t kv_head = tile.h / (a.num_heads / a.kv_heads);
    const T* const k =
        static_cast<const T*>(a.k) + tile.b * a.k_stride[0] + kv_head * a.k_stride[1];
    SoftmaxRow<C> state;
    const int64_t keys = statistics_keys(tile, a.keys, a.causal);
    for (int64_t first = 0; first < keys; first += kTileKeys) {
      C scores[kOwn] = {};
      for (int64_t column = 0; column < a.width; column += kTileWidth) {
        barrier();
        for (int n = thread; n < kTileRows * kTileWidth; n += kThreads) {
          const int64_t r = tile.first_row + n / kTileWidth, c = column + n % kTileWidth;
          q_tile[n / kTileWidth * kStride + n % kTileWidth] =
              r < a.queries && c < a.width
                  ? static_cast<C>(q[r * a.q_stride[2] + c * a.q_stride[3]])
                  : C(0);
        }
        for (int n = thread; n < kTileKeys * kTileWidth; n += kThreads) {
          const int64_t r = first + n / kTileWidth, c = column + n % kTileWidth;
          k_tile[n / kTileWidth * kStride + n % kTileWidth] =
              r < a.keys && c < a.width ? static_cast<C>(k[r * a.k_stride[2] + c * a.k_stride[3]])
                                        : C(0);
        }
        barrier();
        for (int c = 0; c < kTileWidth; ++c)
#pragma unroll
          for (int n = 0; n < kOwn; ++n)
            scores[n] += q_tile[row * kStride + c] * k_tile[(n * kLanes + lane) * kStride + c];
      }
      if (i < a.queries)
#pragma unroll
        for (int n = 0; n < kOwn; ++n)
          state.add(
              masked(a, tile, i, first + n * kLanes + lane, static_cast<C>(a.scale) * scores[n]));
    }
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const SoftmaxRow<C> other{
          shuffle_xor(state.maximum, distance), shuffle_xor(state.sum, distance),
          shuffle_xor(state.moment, distance), shuffle_xor(state.visible, distance)};
      state = SoftmaxRow<C>::merge(state, other);
    }
    const bool counts =
        i < a.queries && !(a.query_padding && a.query_padding[tile.b * a.queries + i]);
    if (lane == 0) {
      row_sums[2 * row] = counts ? state.normalized_entropy() : C(0);
      row_sums[2 * row + 1] = counts ? state.confidence() : C(0);
    }
    barrier();
    if (thread < 2) {
      double sum = 0;
      for (int r = 0; r < kTileRows; ++r) sum += row_sums[2 * r + thread];
      a.sums[block_index() * 2 + thread] = sum;
    }
  }
};

template <typename T>
int run_statistics(const StatisticsArguments& a, Stream stream) {
  using Kernel = StatisticsKernel<T>;
  return launch(Kernel{a}, a.batch * a.num_heads * statistics_row_tiles(a.queries), Kernel::kShared,
                stream);
}

}  // namespace

int attention_statistics(const StatisticsArguments& a, Stream stream) {
  switch (a.type) {
    case Element::f64:
      return run_statistics<double>(a, stream);
    case Element::f32:
      return run_statistics<float>(a, stream);
    case Element::f16:
      return run_statistics<Half>(a, stream);
    case Element::bf16:
      return run_statistics<BFloat16>(a, stream);
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace headwise::kernels::cuda

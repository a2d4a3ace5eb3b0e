#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/kernels.h"
#include "kernels/softmax_row.h"

namespace headwise::kernels::cuda {
namespace {

template <typename C>
__device__ C lane_shuffle(C value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

/// Masks of query i and key j on a score.
template <typename C>
__device__ C masked(const StatisticsArguments& a, const StatisticsTile& tile, int64_t i, int64_t j,
                    C score) {
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
// scores live in registers, kTileKeys / kLanes a thread.
template <typename T, typename C>
__global__ void __launch_bounds__(kStatisticsThreads) statistics_kernel(StatisticsArguments a) {
  constexpr int kOwn = kTileKeys / kLanes;
  __shared__ C q_tile[kTileRows][kTileWidth + 1];
  __shared__ C k_tile[kTileKeys][kTileWidth + 1];
  __shared__ double row_sums[kTileRows][2];
  const auto tile = statistics_tile(blockIdx.x, a.num_heads, a.queries);
  const int thread = threadIdx.x, row = thread / kLanes, lane = thread % kLanes;
  const int64_t i = tile.first_row + row;
  const T* q = static_cast<const T*>(a.q) + tile.b * a.q_stride[0] + tile.h * a.q_stride[1];
  const int64_t kv_head = tile.h / (a.num_heads / a.kv_heads);
  const T* k = static_cast<const T*>(a.k) + tile.b * a.k_stride[0] + kv_head * a.k_stride[1];
  SoftmaxRow<C> state;
  const int64_t keys = statistics_keys(tile, a.keys, a.causal);
  for (int64_t first = 0; first < keys; first += kTileKeys) {
    C scores[kOwn] = {};
    for (int64_t column = 0; column < a.width; column += kTileWidth) {
      __syncthreads();
      for (int n = thread; n < kTileRows * kTileWidth; n += kStatisticsThreads) {
        const int64_t r = tile.first_row + n / kTileWidth, c = column + n % kTileWidth;
        q_tile[n / kTileWidth][n % kTileWidth] =
            r < a.queries && c < a.width ? static_cast<C>(q[r * a.q_stride[2] + c * a.q_stride[3]])
                                         : C(0);
      }
      for (int n = thread; n < kTileKeys * kTileWidth; n += kStatisticsThreads) {
        const int64_t r = first + n / kTileWidth, c = column + n % kTileWidth;
        k_tile[n / kTileWidth][n % kTileWidth] =
            r < a.keys && c < a.width ? static_cast<C>(k[r * a.k_stride[2] + c * a.k_stride[3]])
                                      : C(0);
      }
      __syncthreads();
      for (int c = 0; c < kTileWidth; ++c)
        for (int n = 0; n < kOwn; ++n) scores[n] += q_tile[row][c] * k_tile[n * kLanes + lane][c];
    }
    if (i < a.queries)
      for (int n = 0; n < kOwn; ++n)
        state.add(
            masked(a, tile, i, first + n * kLanes + lane, static_cast<C>(a.scale) * scores[n]));
  }
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const SoftmaxRow<C> other{
        lane_shuffle(state.maximum, distance), lane_shuffle(state.sum, distance),
        lane_shuffle(state.moment, distance), lane_shuffle(state.visible, distance)};
    state = SoftmaxRow<C>::merge(state, other);
  }
  const bool counts =
      i < a.queries && !(a.query_padding && a.query_padding[tile.b * a.queries + i]);
  if (lane == 0) {
    row_sums[row][0] = counts ? state.normalized_entropy() : C(0);
    row_sums[row][1] = counts ? state.confidence() : C(0);
  }
  __syncthreads();
  if (thread < 2) {
    double sum = 0;
    for (int r = 0; r < kTileRows; ++r) sum += row_sums[r][thread];
    a.sums[int64_t{blockIdx.x} * 2 + thread] = sum;
  }
}

template <typename T, typename C>
int launch(const StatisticsArguments& a, Stream stream) {
  const int64_t blocks = a.batch * a.num_heads * statistics_row_tiles(a.queries);
  if (blocks == 0) return cudaSuccess;
  statistics_kernel<T, C><<<static_cast<unsigned>(blocks), kStatisticsThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

int attention_statistics(const StatisticsArguments& a, Stream stream) {
  switch (a.type) {
    case Element::f64:
      return launch<double, double>(a, stream);
    case Element::f32:
      return launch<float, float>(a, stream);
    case Element::f16:
      return launch<__half, float>(a, stream);
    case Element::bf16:
      return launch<__nv_bfloat16, float>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace headwise::kernels::cuda

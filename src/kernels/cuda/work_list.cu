#include "kernels/cuda/kernels.h"

namespace headwise::kernels::cuda {
namespace {

constexpr int kThreads = 1024, kWarp = 32;

// One block: a selection of 64 sequences and 16 heads is 1,024 slots, so more would only wait for
// each other.
__global__ void __launch_bounds__(kThreads)
    work_list_kernel(WorkListShape shape, const int32_t* index, const int32_t* count, int32_t* slot,
                     WorkListOutput out) {
  __shared__ int32_t warp_sums[kWarp];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  clear_slots(shape, thread, kThreads, slot);
  __syncthreads();
  mark_slots(shape, thread, kThreads, index, count, slot);
  __syncthreads();
  const int32_t own = count_chunk(shape, thread, kThreads, slot);
  int32_t inclusive = own;
  for (int d = 1; d < kWarp; d *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int32_t sum = warp_sums[lane];
    for (int d = 1; d < kWarp; d *= 2) {
      const int32_t below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    warp_sums[lane] = sum;
  }
  __syncthreads();
  const int32_t at = (warp ? warp_sums[warp - 1] : 0) + inclusive - own;
  write_chunk(shape, thread, kThreads, slot, at, warp_sums[kWarp - 1], out);
}

}  // namespace

int work_list(const WorkListShape& shape, const int32_t* index, const int32_t* count, int32_t* slot,
              const WorkListOutput& out, Stream stream) {
  work_list_kernel<<<1, kThreads, 0, stream>>>(shape, index, count, slot, out);
  return cudaGetLastError();
}

}  // namespace headwise::kernels::cuda

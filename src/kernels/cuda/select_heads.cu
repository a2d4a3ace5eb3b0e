#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/kernels.h"

namespace headwise::kernels::cuda {
namespace {

constexpr int kWarp = 32, kRows = 4;

template <typename T, typename C>
struct Row {
  const T* values;
  __device__ C operator()(int64_t h) const { return static_cast<C>(values[h]); }
};

// One warp a row: every lane ranks its heads against the row, a ballot gives the places.
template <typename T, typename C>
__global__ void select_kernel(const T* relevance, const int64_t* count, int32_t* index,
                              int64_t batch, int64_t num_heads) {
  const int64_t b = blockIdx.x * int64_t{kRows} + threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  if (b >= batch) return;  // the whole warp
  const int64_t k = clamp_count(count[b], num_heads);
  const Row<T, C> row{relevance + b * num_heads};
  int32_t* out = index + b * num_heads;
  int64_t written = 0;
  for (int64_t first = 0; first < num_heads; first += kWarp) {
    const int64_t h = first + lane;
    const bool chosen = h < num_heads && selection_rank(row, h, num_heads) < k;
    const unsigned ballot = __ballot_sync(0xffffffffu, chosen);
    if (chosen) out[written + __popc(ballot & ((1u << lane) - 1))] = static_cast<int32_t>(h);
    written += __popc(ballot);
  }
  for (int64_t i = written + lane; i < num_heads; i += kWarp) out[i] = -1;
}

template <typename T, typename C>
int launch(const void* relevance, const int64_t* count, int32_t* index, int64_t batch,
           int64_t num_heads, Stream stream) {
  const auto blocks = static_cast<unsigned>((batch + kRows - 1) / kRows);
  select_kernel<T, C><<<blocks, kRows * kWarp, 0, stream>>>(static_cast<const T*>(relevance), count,
                                                            index, batch, num_heads);
  return cudaGetLastError();
}

}  // namespace

int select_heads(const void* relevance, Element type, const int64_t* count, int32_t* index,
                 int64_t batch, int64_t num_heads, Stream stream) {
  if (batch == 0 || num_heads == 0) return cudaSuccess;
  switch (type) {
    case Element::f64:
      return launch<double, double>(relevance, count, index, batch, num_heads, stream);
    case Element::f32:
      return launch<float, float>(relevance, count, index, batch, num_heads, stream);
    case Element::f16:
      return launch<__half, float>(relevance, count, index, batch, num_heads, stream);
    case Element::bf16:
      return launch<__nv_bfloat16, float>(relevance, count, index, batch, num_heads, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace headwise::kernels::cuda

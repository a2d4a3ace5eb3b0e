#include "kernels/cuda/kernels.h"

namespace headwise::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;

template <typename T, bool kGather>
__global__ void copy_kernel(HeadCopyShape shape, const T* from, const int32_t* batch,
                            const int32_t* head, int64_t elements, T* to) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < elements; i += step) {
    const int64_t at = shape.offset(i, batch, head);
    if constexpr (kGather) {
      to[i] = from[at];
    } else {
      to[at] = from[i];
    }
  }
}

template <bool kGather>
int copy(const HeadCopyShape& shape, const void* from, int element_size, const int32_t* batch,
         const int32_t* head, int64_t pairs, void* to, Stream stream) {
  const int64_t elements = pairs * shape.rows * shape.width;
  if (elements == 0) return cudaSuccess;
  int64_t blocks = (elements + kThreads - 1) / kThreads;
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  const auto launch = [&](auto element) {
    using T = decltype(element);
    copy_kernel<T, kGather><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        shape, static_cast<const T*>(from), batch, head, elements, static_cast<T*>(to));
    return static_cast<int>(cudaGetLastError());
  };
  switch (element_size) {
    case 2:
      return launch(uint16_t{});
    case 4:
      return launch(uint32_t{});
    case 8:
      return launch(uint64_t{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int gather_heads(const HeadCopyShape& shape, const void* tensor, int element_size,
                 const int32_t* batch, const int32_t* head, int64_t pairs, void* packed,
                 Stream stream) {
  return copy<true>(shape, tensor, element_size, batch, head, pairs, packed, stream);
}

int scatter_heads(const HeadCopyShape& shape, const void* packed, int element_size,
                  const int32_t* batch, const int32_t* head, int64_t pairs, void* tensor,
                  Stream stream) {
  return copy<false>(shape, packed, element_size, batch, head, pairs, tensor, stream);
}

}  // namespace headwise::kernels::cuda

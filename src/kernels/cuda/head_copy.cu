#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace headwise::kernels::cuda {
namespace {

/// Elements as plain numbers of their size.
template <typename T, bool kGather>
struct CopyKernel {
  static constexpr int kThreads = 256, kEach = 4;  // elements per thread
  HeadCopyShape shape;
  const T* from;
  const int32_t *batch, *head;
  int64_t elements;
  T* to;

  HEADWISE_DEVICE void operator()() const {
    const int64_t first = block_index() * kThreads * kEach + thread_index();
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int64_t i = first + n * kThreads;
      if (i >= elements) return;
      const int64_t at = shape.offset(i, batch, head);
      if constexpr (kGather)
        to[i] = from[at];
      else
        to[at] = from[i];
    }
  }
};

template <bool kGather>
int copy(const HeadCopyShape& shape, const void* from, int element_size, const int32_t* batch,
         const int32_t* head, int64_t pairs, void* to, Stream stream) {
  const int64_t elements = pairs * shape.rows * shape.width;
  const auto run = [&](auto element) {
    using T = decltype(element);
    using Kernel = CopyKernel<T, kGather>;
    constexpr int64_t kBlock = Kernel::kThreads * Kernel::kEach;
    return launch(
        Kernel{shape, static_cast<const T*>(from), batch, head, elements, static_cast<T*>(to)},
        (elements + kBlock - 1) / kBlock, 0, stream);
  };
  switch (element_size) {
    case 2:
      return run(uint16_t{});
    case 4:
      return run(uint32_t{});
    case 8:
      return run(uint64_t{});
    default:
      return 1;  // cudaErrorInvalidValue
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

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace headwise::kernels::cuda {
namespace {

template <typename T>
struct Relevances {
  using C = Accumulator<T>;
  const T* values;
  HEADWISE_DEVICE C operator()(int64_t h) const { return static_cast<C>(values[h]); }
};

// One warp per row: every lane ranks its heads against the row, a ballot gives the places.
template <typename T>
struct SelectKernel {
  static constexpr int kRows = 4, kThreads = kRows * kWarp;
  const T* relevance;
  const int64_t* count;
  int32_t* index;
  int64_t batch, num_heads;

  HEADWISE_DEVICE void operator()() const {
    const int64_t b = block_index() * kRows + warp_index();
    const int lane = lane_index();
    if (b >= batch) return;  // the whole warp
    const int64_t k = clamp_count(count[b], num_heads);
    const Relevances<T> row{relevance + b * num_heads};
    int32_t* const out = index + b * num_heads;
    int64_t written = 0;
    for (int64_t first = 0; first < num_heads; first += kWarp) {
      const int64_t h = first + lane;
      const bool chosen = h < num_heads && selection_rank(row, h, num_heads) < k;
      const uint32_t bits = ballot(chosen);
      if (chosen) out[written + count_bits(bits & ((1u << lane) - 1))] = static_cast<int32_t>(h);
      written += count_bits(bits);
    }
    for (int64_t i = written + lane; i < num_heads; i += kWarp) out[i] = -1;
  }
};

template <typename T>
int run(const void* relevance, const int64_t* count, int32_t* index, int64_t batch,
        int64_t num_heads, Stream stream) {
  using Kernel = SelectKernel<T>;
  return launch(Kernel{static_cast<const T*>(relevance), count, index, batch, num_heads},
                (batch + Kernel::kRows - 1) / Kernel::kRows, 0, stream);
}

}  // namespace

int select_heads(const void* relevance, Element type, const int64_t* count, int32_t* index,
                 int64_t batch, int64_t num_heads, Stream stream) {
  if (batch == 0 || num_heads == 0) return 0;
  switch (type) {
    case Element::f64:
      return run<double>(relevance, count, index, batch, num_heads, stream);
    case Element::f32:
      return run<float>(relevance, count, index, batch, num_heads, stream);
    case Element::f16:
      return run<Half>(relevance, count, index, batch, num_heads, stream);
    case Element::bf16:
      return run<BFloat16>(relevance, count, index, batch, num_heads, stream);
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace headwise::kernels::cuda

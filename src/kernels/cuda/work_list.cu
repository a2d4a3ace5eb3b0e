#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"

namespace headwise::kernels::cuda {
namespace {

// One block: a selection of 64 sequences and 16 heads is 1,024 slots, so more would only wait for
// each other.
struct WorkListKernel {
  static constexpr int kThreads = 1024;
  static constexpr int64_t kShared = 2 * kWarp * sizeof(int32_t);
  WorkListShape shape;
  const int32_t *index, *count;
  int32_t* slot;
  WorkListOutput out;

  HEADWISE_DEVICE static int32_t inclusive_sum(int32_t value) {
    for (int d = 1; d < kWarp; d *= 2) {
      const int from = lane_index() - d;
      const int32_t below = shuffle(value, from < 0 ? 0 : from);
      if (from >= 0) value += below;
    }
    return value;
  }

  HEADWISE_DEVICE void operator()() const {
    int32_t* const warp_sums = reinterpret_cast<int32_t*>(shared_memory());  // of pairs
    int32_t* const warp_rows = warp_sums + kWarp;                            // of packed rows
    const int thread = thread_index(), warp = warp_index();
    clear_slots(shape, thread, kThreads, slot, out);
    barrier();
    mark_slots(shape, thread, kThreads, index, count, slot, out);
    barrier();
    const int32_t own = count_chunk(shape, thread, kThreads, slot);
    const int32_t own_rows = count_rows(shape, thread, kThreads, count);
    const int32_t inclusive = inclusive_sum(own), inclusive_rows = inclusive_sum(own_rows);
    if (lane_index() == kWarp - 1) warp_sums[warp] = inclusive, warp_rows[warp] = inclusive_rows;
    barrier();
    if (warp == 0) {
      warp_sums[lane_index()] = inclusive_sum(warp_sums[lane_index()]);
      warp_rows[lane_index()] = inclusive_sum(warp_rows[lane_index()]);
    }
    barrier();
    const int32_t at = (warp ? warp_sums[warp - 1] : 0) + inclusive - own;
    const int32_t row = (warp ? warp_rows[warp - 1] : 0) + inclusive_rows - own_rows;
    write_chunk(shape, thread, kThreads, slot, at, warp_sums[kWarp - 1], out);
    write_rows(shape, thread, kThreads, count, row, warp_rows[kWarp - 1], out);
    barrier();
    write_packed_heads(shape, thread, kThreads, warp_rows[kWarp - 1], out);
  }
};

template <typename C>
struct KeyLimitKernel {
  static constexpr int kThreads = 128, kWarps = kThreads / kWarp;
  static constexpr int64_t kShared = 2 * kWarps * sizeof(int32_t);
  const bool* forbid;
  const C* add;
  int64_t keys;
  int32_t *limit, *plain;

  HEADWISE_DEVICE void operator()() const {
    int32_t* const ends = reinterpret_cast<int32_t*>(shared_memory());
    int32_t* const counts = ends + kWarps;
    const int64_t row = block_index() * keys;
    const auto hidden = [&](int64_t j) {
      return forbid ? forbid[row + j] : add[row + j] == -static_cast<C>(INFINITY);
    };
    const auto untouched = [&](int64_t j) {
      return forbid ? !forbid[row + j] : add[row + j] == C(0);
    };
    auto seen = visible_keys(hidden, untouched, keys, thread_index(), kThreads);
    for (int d = 1; d < kWarp; d *= 2) {
      const int32_t end = shuffle_xor(seen.end, d), count = shuffle_xor(seen.plain, d);
      seen.end = end > seen.end ? end : seen.end;
      seen.plain += count;
    }
    if (lane_index() == 0) ends[warp_index()] = seen.end, counts[warp_index()] = seen.plain;
    barrier();
    if (thread_index()) return;
    for (int w = 1; w < kWarps; ++w) {
      seen.end = ends[w] > seen.end ? ends[w] : seen.end;
      seen.plain += counts[w];
    }
    limit[block_index()] = seen.end;
    plain[block_index()] = seen.plain;
  }
};

}  // namespace

int work_list(const WorkListShape& shape, const int32_t* index, const int32_t* count, int32_t* slot,
              const WorkListOutput& out, Stream stream) {
  return launch(WorkListKernel{shape, index, count, slot, out}, 1, WorkListKernel::kShared, stream);
}

int key_limits(const bool* forbid, const void* add, Element additive, int64_t batch, int64_t keys,
               int32_t* limit, int32_t* plain, Stream stream) {
  if (additive == Element::f64) {
    using Kernel = KeyLimitKernel<double>;
    return launch(Kernel{forbid, static_cast<const double*>(add), keys, limit, plain}, batch,
                  Kernel::kShared, stream);
  }
  using Kernel = KeyLimitKernel<float>;
  return launch(Kernel{forbid, static_cast<const float*>(add), keys, limit, plain}, batch,
                Kernel::kShared, stream);
}

}  // namespace headwise::kernels::cuda

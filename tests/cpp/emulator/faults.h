// Kernels with one mistake each, which tests expect the emulator to name.
#pragma once

#include "kernels/cuda/device.h"

namespace headwise::kernels::cuda {

enum class Fault {
  none,
  no_barrier,             // a thread reads what another wrote
  no_second_barrier,      // a thread writes again where another may still read
  no_warp_barrier,        // the same between the lanes of a warp
  read_before_arrival,    // of a copy, by the thread that waits
  no_barrier_after_wait,  // and by another one
  copy_over_read,         // a copy begins where another thread may still read
  blocks_collide,         // two blocks write one element
  beside_shared,
  beside_tensor,
};

struct FaultyKernel {
  static constexpr int kThreads = 64;
  static constexpr int64_t kShared = kThreads * 16;
  Fault fault;
  const float* from;  // 4 kThreads elements
  float* to;          // 2 kThreads

  HEADWISE_DEVICE void operator()() const {
    const int thread = thread_index(), other = (thread + 32) % kThreads;
    float* const words = reinterpret_cast<float*>(shared_memory());
    const auto is = [&](Fault one) { return fault == one; };
    words[4 * thread] = from[thread];
    if (!is(Fault::no_barrier)) barrier();
    float sum = words[4 * other];
    if (!is(Fault::no_second_barrier)) barrier();
    words[4 * thread] = sum;
    if (!is(Fault::no_warp_barrier)) warp_barrier();
    sum += words[4 * (thread ^ 1)];
    if (!is(Fault::copy_over_read)) barrier();
    copy_async(words + 4 * thread, from + 4 * thread, 16);
    copy_commit();
    if (!is(Fault::read_before_arrival)) copy_wait<0>();
    sum += words[4 * thread];
    copy_wait<0>();
    if (!is(Fault::no_barrier_after_wait)) barrier();
    sum += words[4 * other];
    if (is(Fault::beside_shared)) sum += words[4 * kThreads + thread];
    if (is(Fault::beside_tensor)) sum += from[4 * kThreads + thread];
    const int64_t at = block_index() * kThreads + thread;
    to[is(Fault::blocks_collide) ? thread : at] = sum;
  }
};

inline int run_faulty(Fault fault, const float* from, float* to) {
  return launch(FaultyKernel{fault, from, to}, 2, FaultyKernel::kShared, nullptr);
}

}  // namespace headwise::kernels::cuda

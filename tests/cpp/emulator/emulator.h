// A CUDA device for kernels written against src/kernels/cuda/device.h, on the host: each thread of
// a block is a fiber, which runs until it meets its block or warp. Threads take turns in a shuffled
// order, asynchronous copies arrive as late as the kernel's waits allow, fresh shared memory holds
// NaN bytes, and addresses are checked for their alignment: a missing barrier, wait or store shows.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "kernels/cuda/shared_memory.h"

#define HEADWISE_DEVICE inline

namespace headwise::emulator {

int thread();
int64_t block();
void barrier();
unsigned char* shared();

/// Meets the other threads of the warp: hands in `bytes` of data, and returns where those of lane 0
/// stand, the other lanes' following 128 bytes apart, until this thread next meets them.
const unsigned char* exchange(const void* data, int bytes);

void copy_async(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int remaining);
void check_aligned(const void* pointer, int bytes, const char* what);
/// Of what has arrived before the last barrier, nothing lacks a fence.
void async_read_fence();
void check_async_reads();

void run(const std::function<void()>& kernel, int64_t blocks, int threads, int64_t shared_bytes);

template <typename T>
T of_lane(const unsigned char* data, int lane) {
  T value;
  std::memcpy(&value, data + 128 * lane, sizeof value);
  return value;
}

}  // namespace headwise::emulator

struct CUstream_st;

namespace headwise::kernels::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

inline int thread_index() { return emulator::thread(); }
inline int64_t block_index() { return emulator::block(); }
inline void barrier() { emulator::barrier(); }
inline void warp_barrier() { emulator::exchange(nullptr, 0); }
inline unsigned char* shared_memory() { return emulator::shared(); }

template <typename T>
T shuffle(T value, int lane) {
  return emulator::of_lane<T>(emulator::exchange(&value, sizeof value), lane);
}
template <typename T>
T shuffle_xor(T value, int distance) {
  return shuffle(value, (thread_index() % 32) ^ distance);
}
inline uint32_t ballot(bool predicate) {
  const auto* data = emulator::exchange(&predicate, sizeof predicate);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    bits |= uint32_t{emulator::of_lane<bool>(data, lane)} << lane;
  return bits;
}

inline int count_bits(uint32_t bits) { return std::popcount(bits); }

inline void copy_async(void* to, const void* from, int bytes) {
  emulator::copy_async(to, from, bytes);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int N>
void copy_wait() {
  emulator::copy_wait(N);
}

inline uint16_t matrix_element(const unsigned char* data, int matrix, int row, int column) {
  const auto* address = emulator::of_lane<const uint16_t*>(data, 8 * matrix + row);
  return address[column];
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::check_aligned(row, 16, "load_matrices");
  const auto* data = emulator::exchange(&row, sizeof row);
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  for (int i = 0; i < 4; ++i)
    r[i] = matrix_element(data, i, g, 2 * t) | uint32_t{matrix_element(data, i, g, 2 * t + 1)}
                                                   << 16;
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::check_aligned(row, 16, "load_matrices_transposed");
  const auto* data = emulator::exchange(&row, sizeof row);
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  for (int i = 0; i < 4; ++i)
    r[i] = matrix_element(data, i, 2 * t, g) | uint32_t{matrix_element(data, i, 2 * t + 1, g)}
                                                   << 16;
}

template <typename T>
uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <typename T>
void unpack(uint32_t bits, float& low, float& high) {
  T pair[2];
  std::memcpy(static_cast<void*>(pair), &bits, sizeof bits);
  low = pair[0], high = pair[1];
}

template <typename T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  } own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto* data = emulator::exchange(&own, sizeof own);
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  for (int half = 0; half < 2; ++half)      // columns 0..7, 8..15 of a
    for (int lane = 0; lane < 4; ++lane) {  // two columns each
      const auto left = emulator::of_lane<Operands>(data, 4 * g + lane);
      for (int column = 0; column < 2; ++column) {
        const auto right = emulator::of_lane<Operands>(data, 4 * (2 * t + column) + lane);
        float b[2];
        unpack<T>(right.b[half], b[0], b[1]);
        for (int row = 0; row < 2; ++row) {
          float x[2];
          unpack<T>(left.a[2 * half + row], x[0], x[1]);
          c[2 * row + column] += x[0] * b[0] + x[1] * b[1];
        }
      }
    }
}

inline void async_read_fence() { emulator::async_read_fence(); }

template <typename T>
void warpgroup_multiply_accumulate(float (&c)[16][4], const uint32_t (&a)[4][4], const T* b) {
  emulator::check_aligned(b, 1024, "warpgroup_multiply_accumulate");
  emulator::check_async_reads();
  const auto* data = emulator::exchange(&a, sizeof a);
  const int g = thread_index() % 32 / 4, t = thread_index() % 4;
  for (int k = 0; k < 64; k += 2) {
    float left[2][2];  // rows g and g + 8, columns k and k + 1
    for (int row = 0; row < 2; ++row) {
      uint32_t bits;
      std::memcpy(&bits,
                  data + 128 * (4 * g + k % 8 / 2) + 16 * (k / 16) + 4 * (k / 8 % 2 * 2 + row),
                  sizeof bits);
      unpack<T>(bits, left[row][0], left[row][1]);
    }
    for (int n = 0; n < 16; ++n)
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * t + e;
        const T* const right = b + 64 * column + ((k / 8) ^ (column % 8)) * 8 + k % 8;
        for (int row = 0; row < 2; ++row)
          c[n][2 * row + e] += left[row][0] * static_cast<float>(right[0]) +
                               left[row][1] * static_cast<float>(right[1]);
      }
  }
}

inline float larger(float a, float b) { return std::fmax(a, b); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float power_of_two(float x) { return std::exp2(x); }

template <typename Kernel>
int launch(const Kernel& kernel, int64_t blocks, int64_t shared_bytes, CUstream_st*) {
  static_assert(shared_fits<Kernel>());
  emulator::run([&] { kernel(); }, blocks, Kernel::kThreads, shared_bytes);
  return 0;
}

template <typename Kernel>
bool warpgroups_run() {
  return true;
}

}  // namespace headwise::kernels::cuda

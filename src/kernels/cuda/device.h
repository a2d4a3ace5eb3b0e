// What a kernel may use of the device: threads, barriers, shuffles, shared memory, asynchronous
// copies and tensor cores, each behind one function. With HEADWISE_EMULATE the same functions come
// from tests/cpp/emulator, where a machine without a GPU runs the very kernels that the device
// runs.
#pragma once

#include <cstdint>

#ifdef HEADWISE_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define HEADWISE_DEVICE __device__ __forceinline__

namespace headwise::kernels::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

HEADWISE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
HEADWISE_DEVICE int64_t block_index() { return blockIdx.x; }
HEADWISE_DEVICE void barrier() { __syncthreads(); }
HEADWISE_DEVICE void warp_barrier() { __syncwarp(); }

/// The dynamic shared memory of the block, aligned to 16 bytes.
HEADWISE_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <typename T>
HEADWISE_DEVICE T shuffle_xor(T value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}
template <typename T>
HEADWISE_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
HEADWISE_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

HEADWISE_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

HEADWISE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// 16 bytes of shared memory, the first `bytes` of them from global memory, the rest zero; both
/// addresses aligned to 16 bytes. Arrives at some copy_wait after copy_commit.
HEADWISE_DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes)
               : "memory");
}
HEADWISE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Until all but the last N committed groups of this thread have arrived.
template <int N>
HEADWISE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

/// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i and
/// receives, of matrix i, elements 2 (lane % 4) and the next of row lane / 4.
HEADWISE_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same of the transposed matrices.
HEADWISE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// c [16, 8] += a [16, 16] b [16, 8] by one warp (mma.m16n8k16). With g = lane / 4, t = lane % 4:
/// a[0..3] hold rows g, g + 8, g, g + 8 and columns 2t (+ 8 in the last two); b[0..1] rows 2t, 2t +
/// 8 of column g; c[0..1] row g, c[2..3] row g + 8, columns 2t and 2t + 1.
template <typename T>
HEADWISE_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
template <>
HEADWISE_DEVICE void multiply_accumulate<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
HEADWISE_DEVICE void multiply_accumulate<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// 2^x; about 2 units in the last place, results below 2^-126 are 0.
HEADWISE_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// Two numbers as 16-bit elements, the first in the lower half.
template <typename T>
HEADWISE_DEVICE uint32_t pack(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <typename T>
HEADWISE_DEVICE void unpack(uint32_t bits, float& low, float& high) {
  T pair[2];
  memcpy(pair, &bits, sizeof bits);
  low = static_cast<float>(pair[0]);
  high = static_cast<float>(pair[1]);
}

/// Blocks that a multiprocessor should hold at once, which bounds the registers of a thread.
template <typename Kernel>
constexpr int resident_blocks() {
  if constexpr (requires { Kernel::kResident; }) return Kernel::kResident;
  return 1;
}

/// A block of kThreads threads a work item; Kernel is a copyable struct with operator().
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, resident_blocks<Kernel>())
    run_kernel(const __grid_constant__ Kernel kernel) {
  kernel();
}

template <typename Kernel>
int launch(const Kernel& kernel, int64_t blocks, int64_t shared_bytes, CUstream_st* stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const auto error =
        cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  return cudaLaunchKernel(run_kernel<Kernel>, dim3(static_cast<unsigned>(blocks)),
                          dim3(Kernel::kThreads), arguments, static_cast<size_t>(shared_bytes),
                          stream);
}

}  // namespace headwise::kernels::cuda
#endif

namespace headwise::kernels::cuda {

constexpr int kWarp = 32;
HEADWISE_DEVICE int lane_index() { return thread_index() % kWarp; }
HEADWISE_DEVICE int warp_index() { return thread_index() / kWarp; }

/// Sums and maxima in float, double for double.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

template <typename T>
constexpr bool kTensorCores = sizeof(T) == 2;

}  // namespace headwise::kernels::cuda

// What a kernel may use of the device: threads, barriers, shuffles, shared memory, asynchronous
// copies and tensor cores, each behind one function. With HEADWISE_EMULATE the same functions come
// from tests/cpp/emulator, where a machine without a GPU runs the very kernels that the device
// runs.
#pragma once

#include <cstdint>

#include "kernels/cuda/shared_memory.h"

#ifdef HEADWISE_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#define HEADWISE_DEVICE __device__ __forceinline__

namespace headwise::kernels::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

HEADWISE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
HEADWISE_DEVICE int64_t block_index() { return blockIdx.x; }
HEADWISE_DEVICE void barrier() { __syncthreads(); }
HEADWISE_DEVICE void warp_barrier() { __syncwarp(); }

/// The dynamic shared memory of the block, aligned to 1,024 bytes.
HEADWISE_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
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

/// The larger one; of a number and a NaN, the number.
HEADWISE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
/// a b + c, rounded once.
HEADWISE_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

/// What arrived in shared memory comes before what the tensor cores read there by themselves.
HEADWISE_DEVICE void async_read_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

/// How the tensor cores find a swizzled tile, which begins at a multiple of 1,024 bytes: groups of
/// eight rows lie 1,024 bytes apart, pieces of 16 bytes are permuted within 128 (mode 1).
HEADWISE_DEVICE uint64_t swizzled_tile(const void* tile) {
  constexpr uint64_t kGroups = uint64_t{1024 >> 4} << 32, kMode = uint64_t{1} << 62;
  return ((shared_address(tile) & 0x3ffff) >> 4) | uint64_t{1} << 16 | kGroups | kMode;
}

#define HEADWISE_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define HEADWISE_SIXTEEN(n) \
  HEADWISE_FOUR(n), HEADWISE_FOUR(n + 1), HEADWISE_FOUR(n + 2), HEADWISE_FOUR(n + 3)
#define HEADWISE_WARPGROUP_MULTIPLY(type)                                                   \
  asm volatile(                                                                             \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                          \
      " {"                                                                                  \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "              \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "    \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "    \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "     \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                                      \
      : HEADWISE_SIXTEEN(0), HEADWISE_SIXTEEN(4), HEADWISE_SIXTEEN(8), HEADWISE_SIXTEEN(12) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))

template <typename T>
HEADWISE_DEVICE void warpgroup_multiply(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (std::is_same_v<T, BFloat16>)
    HEADWISE_WARPGROUP_MULTIPLY("bf16");
  else
    HEADWISE_WARPGROUP_MULTIPLY("f16");
#else
  __trap();  // warpgroups_run() keeps it from being launched
#endif
}
#undef HEADWISE_WARPGROUP_MULTIPLY
#undef HEADWISE_SIXTEEN
#undef HEADWISE_FOUR

/// c [64, 128] += a [64, 64] b' by the four warps of a warpgroup (wgmma.m64n128k16, four times).
/// Each warp has 16 rows, whose fragments of 16 columns and accumulators are laid out as those of
/// multiply_accumulate(); b [128][64] is a swizzled tile. Waits for the result.
template <typename T>
HEADWISE_DEVICE void warpgroup_multiply_accumulate(float (&c)[16][4], const uint32_t (&a)[4][4],
                                                   const T* b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const auto hold = [&] {  // accumulators stay in their registers
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  };
  hold();
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#pragma unroll
  for (int k = 0; k < 4; ++k) warpgroup_multiply<T>(c, a[k], swizzled_tile(b) + 2 * k);
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
  hold();
#else
  __trap();
#endif
}

/// 2^x; about 2 units in the last place, results below 2^-126 are 0.
HEADWISE_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// Two numbers as 16-bit elements, the first in the lower half; one instruction.
template <typename T>
HEADWISE_DEVICE uint32_t pack(float low, float high);
template <>
HEADWISE_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <>
HEADWISE_DEVICE uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
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

/// One block of kThreads threads per work item; Kernel is a copyable struct with operator().
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, resident_blocks<Kernel>())
    run_kernel(const __grid_constant__ Kernel kernel) {
  kernel();
}

template <typename Kernel>
int launch(const Kernel& kernel, int64_t blocks, int64_t shared_bytes, CUstream_st* stream) {
  static_assert(shared_fits<Kernel>());
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

/// True if this device can run a kernel of warpgroup products and it was compiled for them: the
/// portable form that the driver compiles for any device holds none.
template <typename Kernel>
bool warpgroups_run() {
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes{};
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  if (!known || major != 9 || minor != 0) return false;
  static const bool compiled =
      cudaFuncGetAttributes(&attributes, run_kernel<Kernel>) == cudaSuccess &&
      attributes.ptxVersion >= 90;
  return compiled;
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

// A swizzled tile: rows of 64 elements of 16 bits, whose pieces of 16 bytes are permuted so that
// eight rows of a column fall on all banks.
constexpr int kSwizzledRow = 64, kWarpgroupColumns = 128;
/// Where element (row, column) of such a tile stands.
HEADWISE_DEVICE int swizzled(int row, int column) {
  return row * kSwizzledRow + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}

}  // namespace headwise::kernels::cuda

// Sixteen floats at a time in the vector extensions of GCC and Clang: one source that compiles to
// AVX-512, AVX2, SSE or NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// A function with this attribute is compiled for several instruction sets, and the loader picks.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define HEADWISE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HEADWISE_CLONES
#endif
#define HEADWISE_INLINE inline __attribute__((always_inline))

namespace headwise::kernels {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

// Vectors pass by reference: by value their calling convention depends on the instruction set.
HEADWISE_INLINE void load(const float* p, Float16& v) { std::memcpy(&v, p, sizeof v); }
HEADWISE_INLINE void store(float* p, const Float16& v) { std::memcpy(p, &v, sizeof v); }

/// x = exp(x), relative error below 2e-7 (the polynomial of Cephes' expf); 0 below -87.3 and at
/// -inf; NaN stays NaN.
HEADWISE_INLINE void exponential(Float16& x) {
  const Float16 zero = {};
  const Float16 low = zero - 87.3f, high = zero + 88.3f;
  Float16 t = x < low ? low : x;
  t = t > high ? high : t;
  const Float16 n = (t * 1.44269504f + 12582912.f) - 12582912.f;  // nearest integer
  Float16 r = t - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float16 p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Int16 bits = (__builtin_convertvector(n, Int16) + 127) << 23;
  Float16 power;
  std::memcpy(&power, &bits, sizeof power);
  p = p * power;
  x = x < low ? zero : p;
}

}  // namespace headwise::kernels

// Sixteen floats at a time in the vector extensions of GCC and Clang: one source that compiles to
// AVX-512, AVX2, SSE or NEON.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>

// A function with this attribute is compiled for several instruction sets, and the loader picks
// one. Not under the thread sanitizer: its calls in the picking function would run before it is
// initialised.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define HEADWISE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HEADWISE_CLONES
#endif
#define HEADWISE_INLINE inline __attribute__((always_inline))

namespace headwise::kernels {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint32_t Word16 __attribute__((vector_size(64)));
typedef uint16_t Short16 __attribute__((vector_size(32)));
constexpr int64_t kLanes = 16;

// Vectors pass by reference: by value their calling convention depends on the instruction set.
HEADWISE_INLINE void load(const float* p, Float16& v) { std::memcpy(&v, p, sizeof v); }
HEADWISE_INLINE void store(float* p, const Float16& v) { std::memcpy(p, &v, sizeof v); }

/// Sixteen elements of a 16-bit type.
HEADWISE_INLINE void load(const c10::BFloat16* p, Float16& v) {
  Short16 half;
  std::memcpy(&half, p, sizeof half);
  const Int16 bits = __builtin_convertvector(half, Int16) << 16;
  std::memcpy(&v, &bits, sizeof v);
}
HEADWISE_INLINE void load(const c10::Half* p, Float16& v) {
  Short16 half;
  std::memcpy(&half, p, sizeof half);
  const Int16 h = __builtin_convertvector(half, Int16);
  // Exponent and mantissa in their places, 112 too low an exponent, which a product corrects, for
  // subnormal numbers too. Infinities and NaN have the highest exponent of both types.
  const Int16 magnitude = (h & 0x7fff) << 13;
  Float16 scaled;
  std::memcpy(&scaled, &magnitude, sizeof scaled);
  scaled = scaled * 5.192296858534828e33f;  // 2^112
  Int16 bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  const Int16 special = (h & 0x7c00) == 0x7c00;  // true is -1
  bits = (bits | (special & 0x7f800000)) | ((h & 0x8000) << 16);
  std::memcpy(&v, &bits, sizeof v);
}

/// Rounds to nearest, ties to even; NaN stays NaN.
HEADWISE_INLINE void store(c10::BFloat16* p, const Float16& v) {
  Word16 bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Int16 nan = v != v;  // true is -1
  Word16 is_nan;
  std::memcpy(&is_nan, &nan, sizeof is_nan);
  Word16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (is_nan & 0x7fc0) | (~is_nan & rounded);
  const Short16 half = __builtin_convertvector(rounded, Short16);
  std::memcpy(p, &half, sizeof half);
}

/// The first `n` < kLanes elements of what load() and store() take whole.
template <typename T>
HEADWISE_INLINE void load_some(const T* p, int64_t n, Float16& v) {
  T rest[kLanes] = {};
  for (int64_t lane = 0; lane < n; ++lane) rest[lane] = p[lane];
  load(rest, v);
}
template <typename T>
HEADWISE_INLINE void store_some(T* p, int64_t n, const Float16& v) {
  T rest[kLanes];
  store(rest, v);
  for (int64_t lane = 0; lane < n; ++lane) p[lane] = rest[lane];
}

/// One element as a float.
HEADWISE_INLINE float value(const float* p) { return *p; }
HEADWISE_INLINE float value(const c10::BFloat16* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
HEADWISE_INLINE float value(const c10::Half* p) { return static_cast<float>(*p); }

// Half of the lanes onto the other half, four times.
#define HEADWISE_FOLD(v, step)                                                                   \
  v = step(v,                                                                                    \
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
  v = step(v,                                                                                    \
           __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
  v = step(v,                                                                                    \
           __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
  v = step(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#define HEADWISE_PLUS(a, b) ((a) + (b))
/// The sum of the lanes.
HEADWISE_INLINE float lane_sum(const Float16& lanes) {
  Float16 v = lanes;
  HEADWISE_FOLD(v, HEADWISE_PLUS);
  return v[0];
}
/// The largest of the lanes, none of which is NaN.
HEADWISE_INLINE float lane_maximum(const Float16& lanes) {
  Float16 v = lanes, turned;
#define HEADWISE_LARGER(a, b) (turned = (b), (a) > turned ? (a) : turned)
  HEADWISE_FOLD(v, HEADWISE_LARGER);
#undef HEADWISE_LARGER
  return v[0];
}
#undef HEADWISE_PLUS
#undef HEADWISE_FOLD

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

#include "kernels/cpu/packed_gemm.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <exception>

#include "kernels/cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HEADWISE_ROUNDS_IN_HARDWARE
#endif

namespace headwise::kernels {
namespace {

using c10::BFloat16;

constexpr bool interleaved(float) { return false; }
constexpr bool interleaved(BFloat16) { return true; }

template <typename T>
bool try_product() {
  // Sizes that the kernels use, small whole numbers: the result is exact.
  constexpr int64_t m = 16, n = 16, k = 32;
  alignas(64) T a[m * k], b[k * n], packed[k * n];
  float c[m * n];
  for (int64_t i = 0; i < m * k; ++i) a[i] = T(float(i % 5 - 2));
  for (int64_t i = 0; i < k * n; ++i) b[i] = T(float(i % 7 - 3));
  try {
    pack(k, n, b, n, false, packed);
    packed_gemm(m, n, k, a, k, packed, n, c, n, false);
    packed_gemm_done<T>();
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += float(a[i * k + p]) * float(b[p * n + j]);
      if (sum != c[i * n + j]) return false;
    }
  return true;
}

// Words that alias floats or pairs of bfloat16.
typedef uint32_t __attribute__((may_alias)) Word;

// Interleaves the lower (upper) halves of two vectors.
HEADWISE_INLINE void interleave(const Int16& a, const Int16& b, Int16& low, Int16& high) {
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high =
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/// y = x' of a block of 16 by 16 words: interleaving row i with row i + 8 rotates one bit of the
/// row number into the column number; after four times they have changed places.
HEADWISE_INLINE void transpose_block(const Word* x, int64_t ldx, Word* y, int64_t ldy) {
  Int16 a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) std::memcpy(&a[i], x + i * ldx, sizeof a[i]);
  for (int i = 0; i < 8; ++i) interleave(a[i], a[i + 8], b[2 * i], b[2 * i + 1]);
  for (int i = 0; i < 8; ++i) interleave(b[i], b[i + 8], a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < 8; ++i) interleave(a[i], a[i + 8], b[2 * i], b[2 * i + 1]);
  for (int i = 0; i < 8; ++i) interleave(b[i], b[i + 8], a[2 * i], a[2 * i + 1]);
  for (int i = 0; i < kLanes; ++i) std::memcpy(y + i * ldy, &a[i], sizeof a[i]);
}

/// y [columns, rows] = x [rows, columns]' of 32-bit words.
HEADWISE_CLONES
void transpose_words(int64_t rows, int64_t columns, const Word* x, int64_t ldx, Word* y,
                     int64_t ldy) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  // Along the rows, which the processor prefetches: in the other order a weight beyond the caches
  // takes up to twice the time.
  for (int64_t i = 0; i < whole_rows; i += kLanes)
    for (int64_t j = 0; j < whole_columns; j += kLanes)
      transpose_block(x + i * ldx + j, ldx, y + j * ldy + i, ldy);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i)
      y[j * ldy + i] = x[i * ldx + j];
}

/// y [n, 2]: the elements of two rows in turn.
HEADWISE_CLONES
void pair_rows(const uint16_t* a, const uint16_t* b, int64_t n, Word* y) {
  for (int64_t j = 0; j < n; ++j) y[j] = a[j] | uint32_t(b[j]) << 16;
}
HEADWISE_CLONES
void pair_with_zeros(const uint16_t* a, int64_t n, Word* y) {
  for (int64_t j = 0; j < n; ++j) y[j] = a[j];
}

}  // namespace

template <typename T>
bool packed_gemm_supported() {
  static const bool works = try_product<T>();
  return works;
}

void transpose(int64_t rows, int64_t columns, const float* x, int64_t ldx, float* y, int64_t ldy) {
  transpose_words(rows, columns, reinterpret_cast<const Word*>(x), ldx, reinterpret_cast<Word*>(y),
                  ldy);
}

template <>
void pack<float>(int64_t k, int64_t n, const float* b, int64_t ldb, bool transposed, float* packed,
                 int64_t ld) {
  if (transposed) {
    transpose(n, k, b, ldb, packed, ld);
  } else {
    for (int64_t i = 0; i < k; ++i) std::copy_n(b + i * ldb, n, packed + i * ld);
  }
}

template <>
void pack<BFloat16>(int64_t k, int64_t n, const BFloat16* b, int64_t ldb, bool transposed,
                    BFloat16* packed, int64_t ld) {
  // Pairs are words whose first element is the lower half: bfloat16 is packed on little-endian
  // machines only (packed_gemm_supported multiplies a matrix to find out).
  auto* words = reinterpret_cast<Word*>(packed);
  const auto* bits = reinterpret_cast<const uint16_t*>(b);
  if (!transposed) {
    for (int64_t i = 0; i + 1 < k; i += 2)
      pair_rows(bits + i * ldb, bits + (i + 1) * ldb, n, words + i / 2 * ld);
    if (k % 2) pair_with_zeros(bits + (k - 1) * ldb, n, words + k / 2 * ld);
  } else if (k % 2 == 0 && ldb % 2 == 0 && reinterpret_cast<uintptr_t>(b) % 4 == 0) {
    // Pairs of a row of B' stay together: a transpose of 32-bit words.
    transpose_words(n, k / 2, reinterpret_cast<const Word*>(b), ldb / 2, words, ld);
  } else {
    for (int64_t i = 0; i < k; i += 2)
      for (int64_t j = 0; j < n; ++j)
        words[i / 2 * ld + j] =
            bits[j * ldb + i] | (i + 1 < k ? uint32_t(bits[j * ldb + i + 1]) << 16 : 0u);
  }
}

template <typename T>
void packed_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                 float* c, int64_t ldc, bool add) {
  // One row has no next one, whose distance may be any number: oneDNN would allocate by it.
  if (m == 1) lda = k, ldc = n;
  if (k == 1) ldb = n;
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, interleaved(T()));
}

template <typename T>
void packed_gemm_done() {
  at::native::cpublas::brgemm_release(interleaved(T()));
}

namespace {

template <typename T, typename U>
HEADWISE_INLINE void scale_all(const T* x, int64_t n, float factor, U* y) {
  Float16 v;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    load(x + c, v);
    store(y + c, v * factor);
  }
  if (c == n) return;
  load_some(x + c, n - c, v);
  store_some(y + c, n - c, v * factor);
}

HEADWISE_CLONES
void widen(const BFloat16* x, int64_t n, float factor, float* y) { scale_all(x, n, factor, y); }
void widen(const float* x, int64_t n, float factor, float* y) { scale(x, n, factor, y); }

template <typename T>
void transpose_blocks(int64_t rows, int64_t columns, const T* x, int64_t ldx, float factor, T* y,
                      int64_t ldy, float* tile) {
  float* turned = tile + kTransposeRows * columns;  // [columns, kTransposeRows]
  for (int64_t row = 0; row < rows; row += kTransposeRows) {
    const int64_t n = std::min(kTransposeRows, rows - row);
    for (int64_t i = 0; i < n; ++i) widen(x + (row + i) * ldx, columns, factor, tile + i * columns);
    transpose(n, columns, tile, columns, turned, kTransposeRows);
    for (int64_t j = 0; j < columns; ++j)
      convert(turned + j * kTransposeRows, n, y + j * ldy + row);
  }
}

}  // namespace

void transpose_scaled(int64_t rows, int64_t columns, const float* x, int64_t ldx, float factor,
                      float* y, int64_t ldy, float* tile) {
  transpose_blocks(rows, columns, x, ldx, factor, y, ldy, tile);
}
void transpose_scaled(int64_t rows, int64_t columns, const BFloat16* x, int64_t ldx, float factor,
                      BFloat16* y, int64_t ldy, float* tile) {
  transpose_blocks(rows, columns, x, ldx, factor, y, ldy, tile);
}

namespace {

/// A tile of a thin product. Every element is summed in the same order, whatever the tile.
template <int kRows, int kColumns, typename A, typename B>
HEADWISE_INLINE void thin_tile(const Terms& terms, const A* const* a, const B* b, int64_t ldb,
                               float* c, int64_t ldc) {
  const int64_t whole = terms.length / kLanes * kLanes;
  Float16 sum[kRows][kColumns] = {};
  float rest[kRows][kColumns] = {};
  for (int64_t run = 0; run < terms.count; ++run) {
    const B* const from = b + (terms.first ? terms.first[run] : 0);
    const int64_t at = run * terms.length;
    for (int64_t p = 0; p < whole; p += kLanes) {
      Float16 x[kRows], y;
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) load(a[i] + at + p, x[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        load(from + j * ldb + p, y);
        // The processor does not prefetch across gaps between runs: the next columns' run is
        // prefetched here.
        if (terms.first) __builtin_prefetch(from + (j + kColumns) * ldb + p);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[i][j] += x[i] * y;
      }
    }
    for (int64_t p = whole; p < terms.length; ++p)
      for (int j = 0; j < kColumns; ++j)
        for (int i = 0; i < kRows; ++i)
          rest[i][j] += value(a[i] + at + p) * value(from + j * ldb + p);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) c[i * ldc + j] = rest[i][j] + lane_sum(sum[i][j]);
}

template <int kColumns, typename A, typename B>
HEADWISE_INLINE void thin_columns(int64_t m, const Terms& terms, const A* const* a, const B* b,
                                  int64_t ldb, float* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) thin_tile<4, kColumns>(terms, a + i, b, ldb, c + i * ldc, ldc);
  if (i + 2 <= m) {
    thin_tile<2, kColumns>(terms, a + i, b, ldb, c + i * ldc, ldc);
    i += 2;
  }
  if (i < m) thin_tile<1, kColumns>(terms, a + i, b, ldb, c + i * ldc, ldc);
}

template <typename A, typename B>
HEADWISE_INLINE void thin_product(int64_t m, int64_t n, const Terms& terms, const A* const* a,
                                  const B* b, int64_t ldb, float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) thin_columns<4>(m, terms, a, b + j * ldb, ldb, c + j, ldc);
  for (; j < n; ++j) thin_columns<1>(m, terms, a, b + j * ldb, ldb, c + j, ldc);
}

}  // namespace

// Functions, because a template cannot be cloned.
HEADWISE_CLONES
void thin_gemm(int64_t m, int64_t n, const Terms& terms, const float* const* a, const float* b,
               int64_t ldb, float* c, int64_t ldc) {
  thin_product(m, n, terms, a, b, ldb, c, ldc);
}
HEADWISE_CLONES
void thin_gemm(int64_t m, int64_t n, const Terms& terms, const BFloat16* const* a,
               const BFloat16* b, int64_t ldb, float* c, int64_t ldc) {
  thin_product(m, n, terms, a, b, ldb, c, ldc);
}
HEADWISE_CLONES
void thin_gemm(int64_t m, int64_t n, const Terms& terms, const float* const* a, const c10::Half* b,
               int64_t ldb, float* c, int64_t ldc) {
  thin_product(m, n, terms, a, b, ldb, c, ldc);
}

namespace {

template <typename T>
HEADWISE_INLINE void convert_block(int64_t rows, int64_t n, const float* x, int64_t ldx,
                                   const float* bias, T* y, int64_t ldy) {
  Float16 v, b = {};
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy) {
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
      load(x + c, v);
      if (bias) load(bias + c, b);
      store(y + c, v + b);
    }
    if (c == n) continue;
    load_some(x + c, n - c, v);
    if (bias) load_some(bias + c, n - c, b);
    store_some(y + c, n - c, v + b);
  }
}

#ifdef HEADWISE_ROUNDS_IN_HARDWARE
bool rounds_in_hardware() {
  static const bool supported =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
  return supported;
}

#define HEADWISE_ROUNDING __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

/// The first lanes of v, rounded as LibTorch does where the instruction exists: subnormal numbers
/// become zeros.
HEADWISE_ROUNDING inline void store_rounded(BFloat16* y, __mmask16 lanes, const __m512& v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  __m256i bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  _mm256_mask_storeu_epi16(y, lanes, bits);
}

HEADWISE_ROUNDING inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n < kLanes ? (1u << n) - 1 : 0xffffu);
}

/// convert_block() and scale_block() by that instruction.
HEADWISE_ROUNDING void convert_in_hardware(int64_t rows, int64_t n, const float* x, int64_t ldx,
                                           const float* bias, BFloat16* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy)
    for (int64_t c = 0; c < n; c += kLanes) {
      const auto lanes = first_lanes(n - c);
      __m512 v = _mm512_maskz_loadu_ps(lanes, x + c);
      if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, bias + c));
      store_rounded(y + c, lanes, v);
    }
}
HEADWISE_ROUNDING void scale_in_hardware(int64_t rows, int64_t n, const float* x, int64_t ldx,
                                         const float* factors, BFloat16* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy)
    for (int64_t c = 0; c < n; c += kLanes) {
      // Where the factor is 0 nothing is read: what is there may be NaN.
      const auto lanes = first_lanes(n - c);
      const auto read = factors[r] == 0.f ? __mmask16(0) : lanes;
      const __m512 v = _mm512_maskz_loadu_ps(read, x + c);
      store_rounded(y + c, lanes, _mm512_mul_ps(v, _mm512_set1_ps(factors[r])));
    }
}
#endif

template <typename T>
HEADWISE_INLINE void scale_block(int64_t rows, int64_t n, const float* x, int64_t ldx,
                                 const float* factors, T* y, int64_t ldy) {
  Float16 v;
  for (int64_t r = 0; r < rows; ++r, x += ldx, y += ldy) {
    const float factor = factors[r];
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
      load(x + c, v);
      store(y + c, factor == 0.f ? Float16{} : v * factor);
    }
    if (c == n) continue;
    load_some(x + c, n - c, v);
    store_some(y + c, n - c, factor == 0.f ? Float16{} : v * factor);
  }
}

}  // namespace

HEADWISE_CLONES
void convert_rows(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* bias, float* y,
                  int64_t ldy) {
  convert_block(rows, n, x, ldx, bias, y, ldy);
}
HEADWISE_CLONES
void convert_rows(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* bias,
                  BFloat16* y, int64_t ldy) {
#ifdef HEADWISE_ROUNDS_IN_HARDWARE
  if (rounds_in_hardware()) return convert_in_hardware(rows, n, x, ldx, bias, y, ldy);
#endif
  convert_block(rows, n, x, ldx, bias, y, ldy);
}
HEADWISE_CLONES
void convert_scaled(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* factors,
                    float* y, int64_t ldy) {
  scale_block(rows, n, x, ldx, factors, y, ldy);
}
HEADWISE_CLONES
void convert_scaled(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* factors,
                    BFloat16* y, int64_t ldy) {
#ifdef HEADWISE_ROUNDS_IN_HARDWARE
  if (rounds_in_hardware()) return scale_in_hardware(rows, n, x, ldx, factors, y, ldy);
#endif
  scale_block(rows, n, x, ldx, factors, y, ldy);
}
namespace {

template <typename X, typename Y>
HEADWISE_INLINE float dot_of(const X* x, const Y* y, int64_t n) {
  Float16 sum = {}, a, b;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    load(x + c, a);
    load(y + c, b);
    sum += a * b;
  }
  float total = lane_sum(sum);
  for (; c < n; ++c) total += value(x + c) * value(y + c);
  return total;
}

template <typename T>
HEADWISE_INLINE void add_columns(int64_t rows, int64_t n, const T* x, int64_t ldx, float* sum) {
  Float16 total, v;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    load(sum + c, total);
    for (int64_t i = 0; i < rows; ++i) {
      load(x + i * ldx + c, v);
      total += v;
    }
    store(sum + c, total);
  }
  for (; c < n; ++c)
    for (int64_t i = 0; i < rows; ++i) sum[c] += value(x + i * ldx + c);
}

}  // namespace

HEADWISE_CLONES
float dot(const float* x, const float* y, int64_t n) { return dot_of(x, y, n); }
HEADWISE_CLONES
float dot(const float* x, const BFloat16* y, int64_t n) { return dot_of(x, y, n); }
HEADWISE_CLONES
float dot(const BFloat16* x, const BFloat16* y, int64_t n) { return dot_of(x, y, n); }
HEADWISE_CLONES
void add_row_sums(int64_t rows, int64_t n, const float* x, int64_t ldx, float* sum) {
  add_columns(rows, n, x, ldx, sum);
}
HEADWISE_CLONES
void add_row_sums(int64_t rows, int64_t n, const BFloat16* x, int64_t ldx, float* sum) {
  add_columns(rows, n, x, ldx, sum);
}
HEADWISE_CLONES
void scale(const float* x, int64_t n, float factor, float* y) { scale_all(x, n, factor, y); }
HEADWISE_CLONES
void scale(const BFloat16* x, int64_t n, float factor, BFloat16* y) { scale_all(x, n, factor, y); }

void convert(const float* x, int64_t n, float* y) { std::copy_n(x, n, y); }
void convert(const float* x, int64_t n, BFloat16* y) { convert_rows(1, n, x, n, nullptr, y, n); }

template bool packed_gemm_supported<float>();
template bool packed_gemm_supported<BFloat16>();
template void packed_gemm<float>(int64_t, int64_t, int64_t, const float*, int64_t, const float*,
                                 int64_t, float*, int64_t, bool);
template void packed_gemm<BFloat16>(int64_t, int64_t, int64_t, const BFloat16*, int64_t,
                                    const BFloat16*, int64_t, float*, int64_t, bool);
template void packed_gemm_done<float>();
template void packed_gemm_done<BFloat16>();

}  // namespace headwise::kernels

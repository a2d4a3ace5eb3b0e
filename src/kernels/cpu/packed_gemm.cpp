#include "kernels/cpu/packed_gemm.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <exception>

#include "kernels/cpu/simd.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

constexpr bool interleaved(float) { return false; }
constexpr bool interleaved(BFloat16) { return true; }

template <typename T>
bool try_product() {
  // Sizes that the kernels use, small whole numbers: the result is exact.
  constexpr int64_t m = 16, n = 16, k = 32;
  T a[m * k], b[k * n], packed[k * n];
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

/// Rounds to nearest, ties to even; NaN stays NaN.
HEADWISE_CLONES
void round_rows(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    y[i] = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(0x7fc0) : uint16_t(rounded);
  }
}

/// y [columns, rows] = x [rows, columns]', in blocks that stay in L1.
template <typename U>
void transpose(int64_t rows, int64_t columns, const U* x, int64_t ldx, U* y, int64_t ldy) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += block)
    for (int64_t j0 = 0; j0 < columns; j0 += block)
      for (int64_t j = j0; j < std::min(columns, j0 + block); ++j)
        for (int64_t i = i0; i < std::min(rows, i0 + block); ++i) y[j * ldy + i] = x[i * ldx + j];
}

}  // namespace

template <typename T>
bool packed_gemm_supported() {
  static const bool works = try_product<T>();
  return works;
}

template <>
void pack<float>(int64_t k, int64_t n, const float* b, int64_t ldb, bool transposed,
                 float* packed) {
  if (transposed) {
    transpose(n, k, b, ldb, packed, n);
  } else {
    for (int64_t i = 0; i < k; ++i) std::copy_n(b + i * ldb, n, packed + i * n);
  }
}

template <>
void pack<BFloat16>(int64_t k, int64_t n, const BFloat16* b, int64_t ldb, bool transposed,
                    BFloat16* packed) {
  if (transposed && k % 2 == 0 && ldb % 2 == 0 && reinterpret_cast<uintptr_t>(b) % 4 == 0) {
    // Pairs of a row of B' stay together: a transpose of 32-bit words.
    transpose(n, k / 2, reinterpret_cast<const uint32_t*>(b), ldb / 2,
              reinterpret_cast<uint32_t*>(packed), n);
    return;
  }
  const BFloat16 zero(0.f);
  for (int64_t i = 0; i < k; i += 2) {
    BFloat16* y = packed + i * n;
    for (int64_t j = 0; j < n; ++j) {
      y[2 * j] = transposed ? b[j * ldb + i] : b[i * ldb + j];
      y[2 * j + 1] = i + 1 == k ? zero : transposed ? b[j * ldb + i + 1] : b[(i + 1) * ldb + j];
    }
  }
}

template <typename T>
void packed_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                 float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, interleaved(T()));
}

template <typename T>
void packed_gemm_done() {
  at::native::cpublas::brgemm_release(interleaved(T()));
}

void convert(const float* x, int64_t n, float* y) { std::copy_n(x, n, y); }
void convert(const float* x, int64_t n, BFloat16* y) {
  round_rows(x, n, reinterpret_cast<uint16_t*>(y));
}

template bool packed_gemm_supported<float>();
template bool packed_gemm_supported<BFloat16>();
template void packed_gemm<float>(int64_t, int64_t, int64_t, const float*, int64_t, const float*,
                                 int64_t, float*, int64_t, bool);
template void packed_gemm<BFloat16>(int64_t, int64_t, int64_t, const BFloat16*, int64_t,
                                    const BFloat16*, int64_t, float*, int64_t, bool);
template void packed_gemm_done<float>();
template void packed_gemm_done<BFloat16>();

}  // namespace headwise::kernels

// Products of small row-major blocks with a packed right factor, through oneDNN's brgemm as
// LibTorch exports it. Sums are float. On the machines where it runs it beats BLAS calls of this
// size by a fifth, since nothing is repacked from call to call.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace headwise::kernels {

/// Whether brgemm runs here for this type: tried once on a small product.
template <typename T>
bool packed_gemm_supported();

/// Packs B [k, n] for the right-hand side, into rows of length ld. float: unchanged. bfloat16:
/// pairs of rows interleaved, [ceil(k / 2), ld, 2], the missing row zeros.
/// `transposed`: `b` holds B' [n, k]. Room for packed_size(k, ld) elements.
template <typename T>
void pack(int64_t k, int64_t n, const T* b, int64_t ldb, bool transposed, T* packed, int64_t ld);
template <typename T>
void pack(int64_t k, int64_t n, const T* b, int64_t ldb, bool transposed, T* packed) {
  pack(k, n, b, ldb, transposed, packed, n);
}

template <typename T>
int64_t packed_size(int64_t k, int64_t n) {
  return sizeof(T) == 2 ? (k + 1) / 2 * 2 * n : k * n;
}

/// Where row k (even for bfloat16), column n of a packed matrix of row length ld begins.
template <typename T>
const T* packed_at(const T* packed, int64_t ld, int64_t k, int64_t n) {
  return packed + k * ld + n * (sizeof(T) == 2 ? 2 : 1);
}

/// C [m, n] (+)= A [m, k] B [k, n], B packed with row length ldb. k must be even for bfloat16 (A
/// zero-padded where B is).
template <typename T>
void packed_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                 float* c, int64_t ldc, bool add);

/// Up to this many rows, reading B once costs less than packing it.
constexpr int64_t kThinRows = 16;

/// The terms of a thin product: `count` runs of `length`. In A they follow one another, in B run i
/// begins at first[i].
struct Terms {
  int64_t length;
  int64_t count = 1;
  const int64_t* first = nullptr;  ///< null: one run, at 0
};

/// C [m, n] = A B, m <= kThinRows: of A the beginnings of its rows, B as it is stored: B' [n, .],
/// rows ldb apart. B is read once.
void thin_gemm(int64_t m, int64_t n, const Terms& terms, const float* const* a, const float* b,
               int64_t ldb, float* c, int64_t ldc);
void thin_gemm(int64_t m, int64_t n, const Terms& terms, const c10::BFloat16* const* a,
               const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc);
void thin_gemm(int64_t m, int64_t n, const Terms& terms, const float* const* a, const c10::Half* b,
               int64_t ldb, float* c, int64_t ldc);

/// Releases brgemm's state of this thread; call it after the last product of a task.
template <typename T>
void packed_gemm_done();

/// y [columns, rows] = x [rows, columns]'.
void transpose(int64_t rows, int64_t columns, const float* x, int64_t ldx, float* y, int64_t ldy);

/// y [columns, ldy] = factor x [rows, columns]', in T. `tile` [2, kTransposeRows, columns] floats.
constexpr int64_t kTransposeRows = 64;
void transpose_scaled(int64_t rows, int64_t columns, const float* x, int64_t ldx, float factor,
                      float* y, int64_t ldy, float* tile);
void transpose_scaled(int64_t rows, int64_t columns, const c10::BFloat16* x, int64_t ldx,
                      float factor, c10::BFloat16* y, int64_t ldy, float* tile);

/// y [rows, n] = x [rows, n] + bias [n] (null: none) in T; rows are ldx and ldy apart.
void convert_rows(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* bias, float* y,
                  int64_t ldy);
void convert_rows(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* bias,
                  c10::BFloat16* y, int64_t ldy);

/// y [rows, n] = factors [rows] x [rows, n] in T, and zeros where the factor is 0.
void convert_scaled(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* factors,
                    float* y, int64_t ldy);
void convert_scaled(int64_t rows, int64_t n, const float* x, int64_t ldx, const float* factors,
                    c10::BFloat16* y, int64_t ldy);

/// x [n] . y [n], summed in one order.
float dot(const float* x, const float* y, int64_t n);
float dot(const float* x, const c10::BFloat16* y, int64_t n);
float dot(const c10::BFloat16* x, const c10::BFloat16* y, int64_t n);

/// sum [n] += the rows of x [rows, n].
void add_row_sums(int64_t rows, int64_t n, const float* x, int64_t ldx, float* sum);
void add_row_sums(int64_t rows, int64_t n, const c10::BFloat16* x, int64_t ldx, float* sum);

/// y [n] = factor x [n].
void scale(const float* x, int64_t n, float factor, float* y);
void scale(const c10::BFloat16* x, int64_t n, float factor, c10::BFloat16* y);

/// Rows of floats to T.
void convert(const float* x, int64_t n, float* y);
void convert(const float* x, int64_t n, c10::BFloat16* y);

}  // namespace headwise::kernels

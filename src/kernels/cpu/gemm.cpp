#include "kernels/cpu/gemm.h"

#include <algorithm>

// LibTorch's x86 builds carry MKL and export its Fortran interface; elsewhere the symbols may be
// absent, and plain loops take their place.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const float*, const float*, const int*, const float*, const int*,
                                  const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const double*, const double*, const int*, const double*,
                                  const int*, const double*, double*, const int*);
}

namespace headwise::kernels {
namespace {

auto* blas(float) { return sgemm_; }
auto* blas(double) { return dgemm_; }

/// The product in plain loops, rows of B innermost so that compilers vectorise it.
template <typename T>
void loops(Transpose trans_a, Transpose trans_b, int64_t m, int64_t n, int64_t k, T alpha,
           const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    T* ci = c + i * ldc;
    for (int64_t j = 0; j < n; ++j) ci[j] = beta == T(0) ? T(0) : beta * ci[j];
    for (int64_t p = 0; p < k; ++p) {
      const T x = alpha * (trans_a == Transpose::no ? a[i * lda + p] : a[p * lda + i]);
      if (trans_b == Transpose::no)
        for (int64_t j = 0; j < n; ++j) ci[j] += x * b[p * ldb + j];
      else
        for (int64_t j = 0; j < n; ++j) ci[j] += x * b[j * ldb + p];
    }
  }
}

}  // namespace

template <typename T>
void gemm(Transpose trans_a, Transpose trans_b, int64_t m, int64_t n, int64_t k, T alpha,
          const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = beta == T(0) ? T(0) : beta * c[i * ldc + j];
    return;
  }
  // BLAS is column-major: C' = op(B)' op(A)' is the same memory. Its leading dimensions must not be
  // below the row length, even where a single row makes them irrelevant.
  lda = std::max(lda, trans_a == Transpose::no ? k : m);
  ldb = std::max(ldb, trans_b == Transpose::no ? n : k);
  ldc = std::max(ldc, n);
  if (auto* f = blas(T())) {
    const char ta = trans_a == Transpose::no ? 'n' : 't', tb = trans_b == Transpose::no ? 'n' : 't';
    const int im = m, in = n, ik = k, ia = lda, ib = ldb, ic = ldc;
    f(&tb, &ta, &in, &im, &ik, &alpha, b, &ib, a, &ia, &beta, c, &ic);
    return;
  }
  loops(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

template void gemm<float>(Transpose, Transpose, int64_t, int64_t, int64_t, float, const float*,
                          int64_t, const float*, int64_t, float, float*, int64_t);
template void gemm<double>(Transpose, Transpose, int64_t, int64_t, int64_t, double, const double*,
                           int64_t, const double*, int64_t, double, double*, int64_t);

}  // namespace headwise::kernels

#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "kernels/cpu/plain_gemm.h"

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

/// Whether BLAS, whose sizes are ints here, can be given all of these.
bool fit(std::initializer_list<int64_t> sizes) {
  return std::max(sizes) <= std::numeric_limits<int>::max();
}

}  // namespace

template <typename T>
void gemm(Transpose trans_a, Transpose trans_b, int64_t m, int64_t n, int64_t k, T alpha,
          const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  // BLAS is column-major: C' = op(B)' op(A)' is the same memory. Its leading dimensions must not be
  // below the row length, even if a single row makes them irrelevant.
  lda = std::max(lda, trans_a == Transpose::no ? k : m);
  ldb = std::max(ldb, trans_b == Transpose::no ? n : k);
  ldc = std::max(ldc, n);
  auto* f = blas(T());
  // What MKL does with a NaN factor depends on the shape: some kernels treat it as 1.
  if (f && k > 0 && std::isfinite(alpha) && fit({m, n, k, lda, ldb, ldc})) {
    const char ta = trans_a == Transpose::no ? 'n' : 't', tb = trans_b == Transpose::no ? 'n' : 't';
    const int im = m, in = n, ik = k, ia = lda, ib = ldb, ic = ldc;
    f(&tb, &ta, &in, &im, &ik, &alpha, b, &ib, a, &ia, &beta, c, &ic);
    return;
  }
  plain_gemm(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

template void gemm<float>(Transpose, Transpose, int64_t, int64_t, int64_t, float, const float*,
                          int64_t, const float*, int64_t, float, float*, int64_t);
template void gemm<double>(Transpose, Transpose, int64_t, int64_t, int64_t, double, const double*,
                           int64_t, const double*, int64_t, double, double*, int64_t);

}  // namespace headwise::kernels

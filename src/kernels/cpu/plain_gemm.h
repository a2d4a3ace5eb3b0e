// The product of kernels/cpu/gemm.h in plain loops, for builds without BLAS and sizes beyond its
// limits.
#pragma once

#include <cstdint>

#include "kernels/cpu/gemm.h"

namespace headwise::kernels {

/// As gemm. The columns of C are innermost, so that compilers vectorise them where B is not
/// transposed.
template <typename T>
void plain_gemm(Transpose trans_a, Transpose trans_b, int64_t m, int64_t n, int64_t k, T alpha,
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

}  // namespace headwise::kernels

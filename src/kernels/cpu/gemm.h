// Row-major matrix product over raw pointers, single-threaded when called inside parallel work.
#pragma once

#include <cstdint>

namespace headwise::kernels {

enum class Transpose : bool { no = false, yes = true };

/// C [m, n] = alpha * op(A) [m, k] * op(B) [k, n] + beta * C. All row-major, ld = distance between
/// rows as they are stored. beta = 0 never reads C. T is float or double.
template <typename T>
void gemm(Transpose trans_a, Transpose trans_b, int64_t m, int64_t n, int64_t k, T alpha,
          const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc);

}  // namespace headwise::kernels

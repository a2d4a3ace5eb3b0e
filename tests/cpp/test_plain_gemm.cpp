#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "kernels/cpu/plain_gemm.h"

namespace test_plain_gemm {

using headwise::kernels::Transpose;

/// Without BLAS, products run in plain loops: every transposition, rows further apart than they are
/// long, and the old C added, scaled, or not read.
template <typename T>
void expect_products() {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  constexpr int64_t m = 5, n = 7, k = 3, gap = 2;
  at::manual_seed(3);
  for (const bool a_turned : {false, true})
    for (const bool b_turned : {false, true})
      for (const T beta : {T(0), T(1), T(-0.5)}) {
        const at::Tensor a = at::randn({a_turned ? k : m, (a_turned ? m : k) + gap}, options);
        const at::Tensor b = at::randn({b_turned ? n : k, (b_turned ? k : n) + gap}, options);
        at::Tensor c = at::randn({m, n + gap}, options);
        const auto before = c.clone();
        const auto left = a.narrow(1, 0, a_turned ? m : k);
        const auto right = b.narrow(1, 0, b_turned ? k : n);
        const auto product =
            at::matmul(a_turned ? left.t() : left, b_turned ? right.t() : right) * 1.5;
        if (beta == T(0)) c.narrow(1, 0, n).fill_(std::numeric_limits<T>::quiet_NaN());
        headwise::kernels::plain_gemm<T>(Transpose(a_turned), Transpose(b_turned), m, n, k, T(1.5),
                                         a.const_data_ptr<T>(), a.stride(0), b.const_data_ptr<T>(),
                                         b.stride(0), beta, c.mutable_data_ptr<T>(), c.stride(0));
        auto expected = product;
        if (beta != T(0)) expected = product + before.narrow(1, 0, n) * beta;
        EXPECT_TRUE(at::allclose(c.narrow(1, 0, n), expected, 1e-4, 1e-5));
        EXPECT_TRUE(at::equal(c.narrow(1, n, gap), before.narrow(1, n, gap)));
      }
}

TEST(PlainGemm, EqualsMatmul) {
  expect_products<float>();
  expect_products<double>();
}

TEST(PlainGemm, OfNoTermsIsWhatStoodThere) {
  double c[2] = {3, 4};
  headwise::kernels::plain_gemm<double>(Transpose::no, Transpose::no, 1, 2, 0, 1, nullptr, 1,
                                        nullptr, 2, 0.5, c, 2);
  EXPECT_EQ(c[0], 1.5);
  EXPECT_EQ(c[1], 2);
}

}  // namespace test_plain_gemm

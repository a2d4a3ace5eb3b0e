// What tests of several subjects assert.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace checks {

/// The sentence of the error that `call` throws, which must be an `Error`.
template <typename Error = c10::Error, typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

/// `tolerance` is relative to the largest value of `expected`.
inline void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  if (expected.numel() == 0) return;
  const auto a = actual.to(at::kDouble), e = expected.to(at::kDouble);
  EXPECT_TRUE(at::isfinite(a).all().item<bool>());
  const double scale = std::max(e.abs().max().item<double>(), 1e-3);
  EXPECT_LE((a - e).abs().max().item<double>() / scale, tolerance);
}

}  // namespace checks

#include "kernels/cpu/attention_statistics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/gemm.h"
#include "kernels/softmax_row.h"

// The loops over a row are written so that the compiler vectorises them (reductions by omp simd);
// one copy per instruction set, picked when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define HEADWISE_CLONES \
  __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define HEADWISE_CLONES
#endif

namespace headwise::kernels {
namespace {

/// e^x for x <= 0; below -87 the result, smaller than any sum notices, is 0. x = n ln 2 + r with
/// |r| <= ln 2 / 2, the series of e^r to r^7 (truncation under 6e-9), 2^n by its bits.
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float r = clamped - n * 0.693145751953125f;  // ln 2 in two parts, the first exact times n
  r -= n * 1.42860682030941723e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t bits = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  const float y = p * std::bit_cast<float>(bits);
  return x < -87.0f ? 0.0f : y;
}

HEADWISE_CLONES SoftmaxRow<float> reduce_row(const float* s, int64_t n) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  float maximum = kHidden;
  int32_t visible = 0;
#pragma omp simd reduction(max : maximum) reduction(+ : visible)
  for (int64_t j = 0; j < n; ++j) {
    maximum = s[j] > maximum ? s[j] : maximum;
    visible += s[j] != kHidden ? 1 : 0;
  }
  if (visible == 0) return {};
  float sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
  for (int64_t j = 0; j < n; ++j) {
    const float u = s[j] - maximum;
    const float e = exp_nonpositive(u);
    sum += e;
    moment += e * (u < -87.0f ? 0.0f : u);
  }
  return {maximum, sum, moment, visible};
}

SoftmaxRow<double> reduce_row(const double* s, int64_t n) {
  constexpr double kHidden = -std::numeric_limits<double>::infinity();
  SoftmaxRow<double> row;
  for (int64_t j = 0; j < n; ++j) {
    row.maximum = s[j] > row.maximum ? s[j] : row.maximum;
    row.visible += s[j] != kHidden ? 1 : 0;
  }
  for (int64_t j = 0; j < n; ++j) {
    if (s[j] == kHidden) continue;
    const double u = s[j] - row.maximum, e = std::exp(u);
    row.sum += e;
    row.moment += e * u;
  }
  return row;
}

/// Masks of query `i` on the scores of keys [column, column + n).
template <typename T>
void mask_row(const AttentionStatistics<T>& a, int64_t b, int64_t h, int64_t i, int64_t column,
              int64_t n, T* s) {
  if (a.key_bias) {
    const T* bias = a.key_bias + b * a.keys + column;
    for (int64_t j = 0; j < n; ++j) s[j] += bias[j];
  }
  const int64_t at = b * a.mask_batch + h * a.mask_head + i * a.mask_row + column * a.mask_column;
  if (a.mask_add)
    for (int64_t j = 0; j < n; ++j) s[j] += a.mask_add[at + j * a.mask_column];
  if (a.mask_forbid)
    for (int64_t j = 0; j < n; ++j)
      if (a.mask_forbid[at + j * a.mask_column]) s[j] = -std::numeric_limits<T>::infinity();
}

}  // namespace

template <typename T>
void attention_statistics_block(const AttentionStatistics<T>& a, int64_t b, int64_t h, int64_t row,
                                int64_t rows, T* tile, double sums[2]) {
  sums[0] = sums[1] = 0;
  const bool* padding = a.query_padding ? a.query_padding + b * a.queries + row : nullptr;
  if (padding && std::all_of(padding, padding + rows, [](bool p) { return p; })) return;
  SoftmaxRow<T> state[kStatisticsQueries];
  const int64_t columns = a.causal ? std::min(a.lengths[b], row + rows) : a.lengths[b];
  const T* q = a.q + b * a.q_batch + h * a.q_head + row * a.q_row;
  const T* k = a.k + b * a.k_batch + h / (a.num_heads / a.kv_heads) * a.k_head;
  for (int64_t column = 0; column < columns; column += kStatisticsKeys) {
    const int64_t n = std::min(kStatisticsKeys, columns - column);
    gemm<T>(Transpose::no, Transpose::yes, rows, n, a.width, a.scale, q, a.q_row,
            k + column * a.k_row, a.k_row, 0, tile, kStatisticsKeys);
    for (int64_t i = 0; i < rows; ++i) {
      if (padding && padding[i]) continue;
      const int64_t seen = a.causal ? std::clamp<int64_t>(row + i + 1 - column, 0, n) : n;
      if (seen == 0) continue;
      T* s = tile + i * kStatisticsKeys;
      mask_row(a, b, h, row + i, column, seen, s);
      state[i] = SoftmaxRow<T>::merge(state[i], reduce_row(s, seen));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (padding && padding[i]) continue;
    sums[0] += state[i].normalized_entropy();
    sums[1] += state[i].confidence();
  }
}

template void attention_statistics_block<float>(const AttentionStatistics<float>&, int64_t, int64_t,
                                                int64_t, int64_t, float*, double[2]);
template void attention_statistics_block<double>(const AttentionStatistics<double>&, int64_t,
                                                 int64_t, int64_t, int64_t, double*, double[2]);

}  // namespace headwise::kernels

#include "kernels/cpu/attention_statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/simd.h"
#include "kernels/softmax_row.h"

namespace headwise::kernels {
namespace {

/// Sum over the lanes of exp(s - maximum), of that times (s - maximum), and of the visible.
struct Sums {
  Float16 sum = {}, moment = {};
  Int16 visible = {};
};

HEADWISE_INLINE void accumulate(const Float16& s, const Float16& maximum, Sums& sums) {
  const Float16 zero = {};
  const Float16 u = s - maximum;
  Float16 e = u;
  exponential(e);
  sums.sum += e;
  // Far below the maximum e is 0, and 0 * -inf would be NaN; a NaN itself must stay.
  sums.moment += e * (u < zero - 87.3f ? zero : u);
  sums.visible -= s != zero - std::numeric_limits<float>::infinity();  // true is -1
}

// The whole row in one function, so that one clone holds both loops.
HEADWISE_CLONES
void reduce(const float* s, int64_t n, SoftmaxRow<float>& row) {
  constexpr float hidden = -std::numeric_limits<float>::infinity();
  // The rest of the row in a register of masked keys.
  float rest[kLanes];
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t lane = 0; lane < kLanes; ++lane)
    rest[lane] = whole + lane < n ? s[whole + lane] : hidden;
  Float16 tail, top, v;
  load(rest, tail);
  top = tail > Float16{} + hidden ? tail : Float16{} + hidden;
  for (int64_t i = 0; i < whole; i += kLanes) {
    load(s + i, v);
    top = v > top ? v : top;
  }
  const float best = lane_maximum(top);
  // A row without a finite score keeps shift 0: -inf - -inf would be NaN.
  const Float16 maximum = Float16{} + (best == hidden ? 0.0f : best);
  Sums sums;
  for (int64_t i = 0; i < whole; i += kLanes) {
    load(s + i, v);
    accumulate(v, maximum, sums);
  }
  if (whole < n) accumulate(tail, maximum, sums);
  row.sum = lane_sum(sums.sum);
  row.moment = lane_sum(sums.moment);
  for (int lane = 0; lane < kLanes; ++lane) row.visible += sums.visible[lane];
  row.maximum = best;
}

SoftmaxRow<float> reduce_row(const float* s, int64_t n) {
  SoftmaxRow<float> row;
  reduce(s, n, row);
  return row.visible == 0 ? SoftmaxRow<float>{} : row;
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

#include "ops/attention_statistics.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/cpu/attention_statistics.h"
#include "kernels/cpu/parallel.h"

namespace headwise::ops {
namespace {

/// In the compute type, each row of d consecutive elements; copies only if needed.
at::Tensor rows(const at::Tensor& t, at::ScalarType type) {
  const auto y = t.to(type);
  const bool usable = (y.stride(3) == 1 || y.size(3) <= 1) && y.stride(2) >= y.size(3);
  return usable ? y : y.contiguous();
}

template <typename T>
Statistics compute(const StatisticsInputs& in) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  constexpr T hidden = -std::numeric_limits<T>::infinity();
  const auto q = rows(in.q, type), k = rows(in.k, type);
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), d = q.size(3), S = k.size(2);
  kernels::AttentionStatistics<T> a{};
  a.batch = B, a.num_heads = H, a.kv_heads = k.size(1), a.queries = L, a.keys = S, a.width = d;
  a.scale = static_cast<T>(in.scale.value_or(d ? 1 / std::sqrt(static_cast<double>(d)) : 1.0));
  a.causal = in.is_causal;
  a.q = q.template const_data_ptr<T>();
  a.q_batch = q.stride(0), a.q_head = q.stride(1), a.q_row = q.stride(2);
  a.k = k.template const_data_ptr<T>();
  a.k_batch = k.stride(0), a.k_head = k.stride(1), a.k_row = k.stride(2);

  // Keys after the last visible one are not computed; a mask that hides or shifts keys before it is
  // added to the scores.
  std::vector<int64_t> lengths(B, S);
  at::Tensor key_bias;
  if (in.key_padding_mask) {
    const auto& mask = *in.key_padding_mask;
    key_bias = mask.scalar_type() == at::kBool
                   ? at::zeros({B, S}, mask.options().dtype(type)).masked_fill_(mask, hidden)
                   : mask.to(type).contiguous();
    const T* bias = key_bias.template const_data_ptr<T>();
    bool needed = false;
    for (int64_t b = 0; b < B; ++b, bias += S) {
      while (lengths[b] > 0 && bias[lengths[b] - 1] == hidden) --lengths[b];
      for (int64_t j = 0; j < lengths[b]; ++j) needed |= bias[j] != T(0);
    }
    if (needed) a.key_bias = key_bias.template const_data_ptr<T>();
  }
  a.lengths = lengths.data();
  at::Tensor query_padding;
  if (in.query_padding_mask) {
    query_padding = in.query_padding_mask->contiguous();
    a.query_padding = query_padding.const_data_ptr<bool>();
  }
  at::Tensor attn_mask;
  if (in.attn_mask) {
    const bool boolean = in.attn_mask->scalar_type() == at::kBool;
    attn_mask = (boolean ? *in.attn_mask : in.attn_mask->to(type)).expand({B, H, L, S});
    if (boolean) {
      a.mask_forbid = attn_mask.const_data_ptr<bool>();
    } else {
      a.mask_add = attn_mask.template const_data_ptr<T>();
    }
    a.mask_batch = attn_mask.stride(0), a.mask_head = attn_mask.stride(1);
    a.mask_row = attn_mask.stride(2), a.mask_column = attn_mask.stride(3);
  }

  // Each (sequence, head, block of queries) adds up on its own; then blocks in order, so that the
  // result does not depend on the number of threads.
  const int64_t blocks = (L + kernels::kStatisticsQueries - 1) / kernels::kStatisticsQueries;
  std::vector<double> sums(2 * B * H * blocks);
  const int64_t size = kernels::kStatisticsQueries * kernels::kStatisticsKeys;
  const std::unique_ptr<T[]> tiles(new T[size * at::get_num_threads()]);
  kernels::parallel_tasks(B * H * blocks, [&](int64_t task, int64_t worker) {
    const int64_t row = task % blocks * kernels::kStatisticsQueries;
    kernels::attention_statistics_block(a, task / blocks / H, task / blocks % H, row,
                                        std::min(kernels::kStatisticsQueries, L - row),
                                        tiles.get() + worker * size, &sums[2 * task]);
  });
  auto entropy = at::zeros({B, H}, q.options()), confidence = at::zeros({B, H}, q.options());
  T* entropy_p = entropy.template mutable_data_ptr<T>();
  T* confidence_p = confidence.template mutable_data_ptr<T>();
  for (int64_t b = 0; b < B; ++b) {
    int64_t counted = L;
    if (a.query_padding)
      for (int64_t i = 0; i < L; ++i) counted -= a.query_padding[b * L + i];
    if (counted == 0) continue;
    for (int64_t h = 0; h < H; ++h) {
      double total[2] = {0, 0};
      for (int64_t i = 0; i < blocks; ++i)
        for (int n = 0; n < 2; ++n) total[n] += sums[2 * ((b * H + h) * blocks + i) + n];
      entropy_p[b * H + h] = static_cast<T>(total[0] / counted);
      confidence_p[b * H + h] = static_cast<T>(total[1] / counted);
    }
  }
  return {entropy, confidence};
}

Statistics statistics_cpu(HEADWISE_STATISTICS_PARAMETERS) {
  const StatisticsInputs in{HEADWISE_STATISTICS_ARGUMENTS};
  check_inputs(in);
  return q.scalar_type() == at::kDouble ? compute<double>(in) : compute<float>(in);
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("attention_statistics", statistics_cpu); }

}  // namespace
}  // namespace headwise::ops

#include "ops/aten/pair_attention.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/dropout.h"
#include "ops/attention_ops.h"

namespace headwise::ops::aten {
namespace {

using at::Tensor;

constexpr double kHidden = -std::numeric_limits<double>::infinity();
constexpr int64_t kScores = int64_t{1} << 26;  // scores held at a time: 256 MiB of float32

Tensor additive(const Tensor& mask, at::ScalarType type) {
  if (mask.scalar_type() != at::kBool) return mask.to(type);
  return at::zeros(mask.sizes(), mask.options().dtype(type)).masked_fill_(mask, kHidden);
}

double scale_of(const PairAttention& a, const Tensor& q) {
  return a.arguments.scale.value_or(q.size(2) ? 1 / std::sqrt(double(q.size(2))) : 1.0);
}

/// Everything that is added to the scores of pairs [first, first + n): broadcastable to
/// [n, L, S + added]; undefined if there is nothing to add.
Tensor bias_of(const PairAttention& a, int64_t first, int64_t n, int64_t queries, int64_t keys,
               at::ScalarType type) {
  const auto& arguments = a.arguments;
  Tensor bias;
  const auto add = [&](const Tensor& more) { bias = bias.defined() ? bias + more : more; };
  const auto b = a.list.batch.narrow(0, first, n).to(at::kLong);  // [n]
  const auto h = a.list.head.narrow(0, first, n).to(at::kLong);   // [n]
  if (arguments.key_padding_mask) {
    const auto rows = arguments.key_padding_mask->index_select(0, b);  // [n, S]
    add(additive(rows, type).unsqueeze(1));
  }
  if (arguments.attn_mask) {
    auto mask = *arguments.attn_mask;
    while (mask.dim() < 4) mask = mask.unsqueeze(0);
    // A dimension that is broadcast stays so: [B or 1, H or 1, L or 1, S or 1].
    if (mask.size(0) == 1 && mask.size(1) == 1) {
      mask = mask.select(0, 0);
    } else {
      const auto zero = at::zeros_like(b);
      mask = mask.index({mask.size(0) == 1 ? zero : b, mask.size(1) == 1 ? zero : h});
    }
    add(additive(mask, type));
  }
  if (arguments.is_causal) {
    const auto options = a.list.batch.options().dtype(at::kBool);
    add(additive(at::ones({queries, keys}, options).triu(1), type).unsqueeze(0));
  }
  if (bias.defined() && a.added) {
    if (bias.size(-1) != keys) bias = bias.expand({bias.size(0), bias.size(1), keys});
    bias = at::constant_pad_nd(bias, {0, a.added});
  }
  return bias;
}

/// The factors of dropout for probabilities [n, L, keys]: the generator of kernels/dropout.h, so
/// that a seed means the same mask on every device. The mask is drawn on the host and copied to the
/// device.
Tensor dropout_factor(const PairAttention& a, int64_t first, int64_t n, int64_t queries,
                      int64_t keys, const Tensor& like) {
  const double p = a.arguments.dropout_p;
  const auto threshold = kernels::dropout_threshold(p);
  const auto seed = static_cast<uint64_t>(a.arguments.dropout_seed->item<int64_t>());
  const auto b = a.list.batch.narrow(0, first, n).cpu(), h = a.list.head.narrow(0, first, n).cpu();
  auto factor = at::empty({n, queries, keys}, like.options().device(at::kCPU).dtype(at::kFloat));
  float* out = factor.mutable_data_ptr<float>();
  for (int64_t pair = 0; pair < n; ++pair)
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t j = 0; j < keys; ++j) {
        const auto counter = kernels::dropout_counter(b.const_data_ptr<int32_t>()[pair],
                                                      h.const_data_ptr<int32_t>()[pair], i, j,
                                                      a.num_heads, queries, keys);
        *out++ = kernels::counter_bits(seed, counter) < threshold ? 1.0f : 0.0f;
      }
  // Scaled after the conversion: 1 / (1 - p) in float32 would be too coarse for float64.
  return factor.to(like.options()).mul_(p < 1 ? 1 / (1 - p) : 0.0);
}

/// softmax(scale q k' + bias) of pairs [first, first + n), zeros in rows that see no key.
Tensor probabilities(const PairAttention& a, int64_t first, int64_t n, const Tensor& q,
                     const Tensor& k) {
  auto scores = at::bmm(q * scale_of(a, q), k.transpose(1, 2));  // [n, L, S + added]
  const auto bias = bias_of(a, first, n, q.size(1), k.size(1) - a.added, scores.scalar_type());
  if (!bias.defined()) return at::softmax(scores, -1);
  scores.add_(bias);
  const auto blind = scores.eq(kHidden).all(-1, true);  // [n, L, 1]
  return at::softmax(scores.masked_fill_(blind, 0), -1).masked_fill_(blind, 0);
}

int64_t pairs_at_a_time(int64_t queries, int64_t keys) {
  return std::max<int64_t>(1, kScores / std::max<int64_t>(1, queries * keys));
}

/// LibTorch's fused attention; what it gives in rows that see no key differs by backend, so those
/// rows are set to zero here.
Tensor fused_forward(const PairAttention& a, int64_t first, int64_t n, const Tensor& q,
                     const Tensor& k, const Tensor& v) {
  const auto& arguments = a.arguments;
  const bool only_causal =
      arguments.is_causal && !arguments.key_padding_mask && !arguments.attn_mask && !a.added;
  std::optional<Tensor> bias;
  if (!only_causal) {
    const auto b = bias_of(a, first, n, q.size(1), k.size(1) - a.added, q.scalar_type());
    if (b.defined()) bias = b.expand({n, q.size(1), k.size(1)}).unsqueeze(1);
  }
  auto context = at::scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1),
                                                  bias, 0.0, only_causal, scale_of(a, q))
                     .squeeze(1);
  if (bias) context = context.masked_fill(bias->squeeze(1).eq(kHidden).all(-1, true), 0);
  return context;
}

}  // namespace

Tensor attention_forward(const PairAttention& a, const Tensor& q, const Tensor& k,
                         const Tensor& v) {
  const int64_t N = q.size(0), L = q.size(1), keys = k.size(1);
  auto context = at::zeros({N, L, v.size(2)}, q.options());
  if (N == 0 || L == 0 || keys == 0) return context;
  const bool plain_mask = !a.arguments.key_padding_mask && !a.arguments.attn_mask && !a.added;
  // Pairs are the batch of LibTorch's attention, which is a dimension of a CUDA grid: 65,535 at
  // most.
  constexpr int64_t kMostPairs = 65535;
  const int64_t step =
      std::min(kMostPairs, plain_mask && a.arguments.dropout_p == 0 ? N : pairs_at_a_time(L, keys));
  const auto type = lse_type(q.scalar_type());
  for (int64_t first = 0; first < N; first += step) {
    const int64_t n = std::min(step, N - first);
    const auto part = [&](const Tensor& t) { return t.narrow(0, first, n); };
    if (a.arguments.dropout_p == 0) {
      part(context).copy_(fused_forward(a, first, n, part(q), part(k), part(v)));
      continue;
    }
    auto p = probabilities(a, first, n, part(q).to(type), part(k).to(type));
    p.mul_(dropout_factor(a, first, n, L, keys, p));
    part(context).copy_(at::bmm(p, part(v).to(type)));
  }
  return context;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const PairAttention& a,
                                                              const Tensor& q, const Tensor& k,
                                                              const Tensor& v,
                                                              const Tensor& grad_context,
                                                              bool mask_gradient) {
  const auto type = lse_type(q.scalar_type());
  const int64_t N = q.size(0), L = q.size(1), keys = k.size(1), S = keys - a.added;
  const auto options = q.options().dtype(type);
  auto dq = at::zeros(q.sizes(), options), dk = at::zeros(k.sizes(), options),
       dv = at::zeros(v.sizes(), options);
  Tensor dmask;
  if (mask_gradient) dmask = at::zeros({a.batch, a.num_heads, L, S}, options);
  const double scale = scale_of(a, q);
  const int64_t step = pairs_at_a_time(L, keys);
  for (int64_t first = 0; first < N && L > 0 && keys > 0; first += step) {
    const int64_t n = std::min(step, N - first);
    const auto part = [&](const Tensor& t) { return t.narrow(0, first, n).to(type); };
    const auto qn = part(q), kn = part(k), vn = part(v), gn = part(grad_context);
    const auto p = probabilities(a, first, n, qn, kn);  // [n, L, S + added]
    auto dp = at::bmm(gn, vn.transpose(1, 2));
    if (a.arguments.dropout_p > 0) {
      const auto factor = dropout_factor(a, first, n, L, keys, p);
      dp.mul_(factor);
      dv.narrow(0, first, n).copy_(at::bmm((p * factor).transpose(1, 2), gn));
    } else {
      dv.narrow(0, first, n).copy_(at::bmm(p.transpose(1, 2), gn));
    }
    // Where the probability is 0 there is no gradient, whatever the value of a hidden key holds.
    dp.masked_fill_(p.eq(0), 0);
    const auto ds = p * (dp - (p * dp).sum(-1, true));  // [n, L, S + added]
    dq.narrow(0, first, n).copy_(at::bmm(ds, kn).mul_(scale));
    dk.narrow(0, first, n).copy_(at::bmm(ds.transpose(1, 2), qn).mul_(scale));
    if (mask_gradient)
      dmask.index_put_({a.list.batch.narrow(0, first, n).to(at::kLong),
                        a.list.head.narrow(0, first, n).to(at::kLong)},
                       ds.narrow(2, 0, S));
  }
  if (mask_gradient)
    dmask =
        at::sum_to(dmask, a.arguments.attn_mask->sizes()).to(a.arguments.attn_mask->scalar_type());
  return {dq, dk, dv, dmask};
}

}  // namespace headwise::ops::aten

#include "explain/peaks.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "headwise/dense_attention.h"

namespace headwise {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kBlockElements = int64_t{1} << 21;  // of attention held at a time

/// What queries [row, row + rows) may not see, as one mask over the S keys, or none.
OptionalTensor mask_of_rows(const OptionalTensor& attn_mask, bool is_causal, int64_t row,
                            int64_t rows, const at::Tensor& k) {
  OptionalTensor mask = attn_mask;
  if (mask && mask->size(-2) != 1) mask = mask->narrow(-2, row, rows);
  if (!is_causal) return mask;
  const auto keys = at::arange(k.size(2), k.options().dtype(at::kLong));        // [S]
  const auto last = at::arange(row, row + rows, k.options().dtype(at::kLong));  // [rows]
  auto future = keys.unsqueeze(0).gt(last.unsqueeze(1));                        // [rows, S]
  if (!mask) return future;
  if (mask->scalar_type() == at::kBool) return mask->logical_or(future);
  return mask->masked_fill(future, -std::numeric_limits<double>::infinity());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_peaks(const at::Tensor& q, const at::Tensor& k,
                                                   const OptionalTensor& key_padding_mask,
                                                   const OptionalTensor& attn_mask, bool is_causal,
                                                   const OptionalTensor& excluded,
                                                   std::optional<double> scale) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) &&
                        q.size(1) == k.size(1) && q.size(3) == k.size(3),
                    "q and k must have shapes [B, H, L, d] and [B, H, S, d], got ", q.sizes(),
                    " and ", k.sizes());
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), S = k.size(2);
  TORCH_CHECK_VALUE(!excluded || (excluded->scalar_type() == at::kBool && excluded->dim() == 2 &&
                                  excluded->size(0) == B && excluded->size(1) == S),
                    "excluded must be boolean [", B, ", ", S, "]");
  const bool narrow = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const auto type = narrow ? at::kFloat : q.scalar_type();
  const auto options = q.options().requires_grad(false);
  auto key = at::full({B, H, L}, -1, options.dtype(at::kInt));
  auto weight = at::zeros({B, H, L}, options.dtype(type));
  if (B * H * L * S == 0) return {key, weight};
  const at::NoGradGuard no_grad;
  const auto wide_k = k.detach().to(type);
  const int64_t block = std::clamp<int64_t>(kBlockElements / (B * H * S), 1, L);
  for (int64_t row = 0; row < L; row += block) {
    const int64_t rows = std::min(block, L - row);
    AttentionArguments arguments;
    arguments.key_padding_mask = key_padding_mask;
    arguments.attn_mask = mask_of_rows(attn_mask, is_causal, row, rows, k);
    arguments.scale = scale;
    auto p = attention_probabilities(q.detach().narrow(2, row, rows).to(type), wide_k, arguments);
    // A hidden key has probability 0 and is never the peak, even if all others are hidden too.
    if (excluded) p = p.masked_fill(excluded->unsqueeze(1).unsqueeze(1), 0.0);
    const auto [largest, where] = p.max(-1);  // [B, H, rows]
    key.narrow(2, row, rows).copy_(where.masked_fill(largest.le(0), -1));
    weight.narrow(2, row, rows).copy_(largest);
  }
  return {key, weight};
}

std::tuple<at::Tensor, at::Tensor> peak_hits(const at::Tensor& key, const at::Tensor& trials,
                                             const at::Tensor& group, int64_t questions,
                                             bool others_only) {
  TORCH_CHECK_VALUE(key.dim() == 3, "key must have shape [B, H, L], got ", key.sizes());
  TORCH_CHECK_VALUE(trials.dim() == 2 && trials.size(1) == 4 && trials.scalar_type() == at::kLong,
                    "trials must be int64 [T, 4], got ", trials.sizes());
  TORCH_CHECK_VALUE(group.dim() == 2 && group.size(0) == key.size(0),
                    "group must have shape [B, S], got ", group.sizes());
  constexpr int64_t kMostQuestions = 65'536;
  TORCH_CHECK_VALUE(questions >= 0 && questions <= kMostQuestions, "questions must be in 0..",
                    kMostQuestions, ", got ", questions);
  const int64_t B = key.size(0), H = key.size(1);
  const auto options = key.options().dtype(at::kInt);
  auto hits = at::zeros({B * questions, H}, options);
  auto asked = at::zeros({B * questions}, options);
  if (trials.size(0) > 0) {
    const std::vector<int64_t> limits{B, questions, key.size(2), group.size(1)};
    const auto bounds = at::tensor(limits, trials.options());
    TORCH_CHECK_INDEX(trials.ge(0).logical_and(trials.lt(bounds)).all().item<bool>(),
                      "trials must be (sequence, question, query, key) within ",
                      at::IntArrayRef(limits));
    const auto b = trials.select(1, 0), f = trials.select(1, 1), i = trials.select(1, 2),
               j = trials.select(1, 3);                                             // [T]
    const auto seen = key.to(at::kLong).transpose(1, 2).index({b, i});              // [T, H]
    const auto found = group.index({b.unsqueeze(1), seen.clamp_min(0)});            // [T, H]
    auto hit = found.eq(group.index({b, j}).unsqueeze(1)).logical_and(seen.ge(0));  // [T, H]
    if (others_only) hit = hit.logical_and(seen.ne(i.unsqueeze(1)));
    const auto row = b * questions + f;
    hits.index_add_(0, row, hit.to(at::kInt));
    asked.index_add_(0, row, at::ones_like(row, options));
  }
  return {hits.view({B, questions, H}).transpose(1, 2), asked.view({B, questions})};
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("attention_peaks", attention_peaks);
  m.impl("peak_hits", peak_hits);
}

}  // namespace headwise

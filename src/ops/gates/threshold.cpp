// Hybrid dynamic pruning (Jaradat et al. 2024, arXiv 2407.12893). From the paper: decisions by the
// integer parts of queries and keys, blocks of scores, a head dropped under a threshold, three of
// four products. Reconstructed, because the paper does not give it in full: the integer part is
// taken towards zero, the row's threshold is the formula of kept_blocks, the head's importance is
// the plain sum over its blocks. Ours: the length-normalised importance, `resolution`, `min_heads`.
#include "ops/gates/threshold.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "attention_masks.h"
#include "headwise/selection.h"

namespace headwise {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// [B or 1, 1 or H, L, S] of 1 where a query that is not padding may see a key, else 0.
at::Tensor visible_scores(const at::Tensor& q, const at::Tensor& k,
                          const std::optional<at::Tensor>& key_padding_mask,
                          const std::optional<at::Tensor>& query_padding_mask,
                          const std::optional<at::Tensor>& attn_mask, bool is_causal,
                          int64_t added_keys) {
  auto visible = at::ones_symint({1, 1, q.sym_size(2), k.sym_size(2)}, q.options());
  const auto mask = merge_masks(q, k, key_padding_mask, attn_mask, is_causal, added_keys);
  if (mask) {
    visible = visible * mask->detach().ne(-kInf).to(q.scalar_type());
  }
  if (query_padding_mask) {
    const auto& padding = *query_padding_mask;
    const auto real =
        padding.scalar_type() == at::kBool ? padding.logical_not() : padding.ne(-kInf);  // [B, L]
    visible = visible * real.to(q.scalar_type()).unsqueeze(1).unsqueeze(3);
  }
  return visible;
}

// A block of more than all rows and columns is one of just those: it need not be filled up.
int64_t fitting_block(int64_t block, const at::Tensor& scores) {
  const auto longest = std::max<int64_t>({scores.sym_size(2).guard_int(__FILE__, __LINE__),
                                          scores.sym_size(3).guard_int(__FILE__, __LINE__), 1});
  return std::min(block, longest);
}

// Sums over blocks of the last two dimensions, the ragged ends included.
at::Tensor block_sums(const at::Tensor& x, int64_t given) {
  const int64_t block = fitting_block(given, x);
  const auto rows = (block - x.sym_size(2) % block) % block;
  const auto columns = (block - x.sym_size(3) % block) % block;
  const auto padded = at::constant_pad_nd_symint(x, {0, columns, 0, rows});
  return padded
      .reshape_symint({x.sym_size(0), x.sym_size(1), padded.sym_size(2) / block, block,
                       padded.sym_size(3) / block, block})
      .sum({3, 5});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> integer_importance(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& query_padding_mask, const std::optional<at::Tensor>& attn_mask,
    bool is_causal, double resolution, int64_t block, bool normalize, int64_t added_keys) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4,
                    "q and k must have shapes [B, H, L, d] and [B, H, S, d], got ", q.sizes(),
                    " and ", k.sizes());
  TORCH_CHECK_VALUE(block >= 1, "block must be at least 1, got ", block);
  TORCH_CHECK_VALUE(resolution > 0.0, "resolution must be positive, got ", resolution);
  const auto fixed_q = q.detach(), fixed_k = k.detach();
  const bool narrow = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const auto dtype = narrow ? at::kFloat : q.scalar_type();
  const auto integer_q = (fixed_q * resolution).trunc().to(dtype);
  const auto integer_k = (fixed_k * resolution).trunc().to(dtype);
  const auto visible = visible_scores(fixed_q, fixed_k, key_padding_mask, query_padding_mask,
                                      attn_mask, is_causal, added_keys)
                           .to(dtype);
  const auto scores = at::matmul(integer_q, integer_k.transpose(2, 3)).abs() * visible;
  const auto blocks = block_sums(scores, block);
  const auto seen = block_sums(visible, block).expand_as(blocks);
  auto head = blocks.sum({2, 3});  // [B, H]
  if (normalize) {
    head = head / seen.sum({2, 3}).clamp_min(1.0);
  }
  return {blocks, seen, head};
}

at::Tensor kept_blocks(const at::Tensor& blocks, const at::Tensor& visible, double ratio) {
  TORCH_CHECK_VALUE(ratio > -1.0 && ratio < 1.0, "block_ratio must be in (-1, 1), got ", ratio);
  const auto seen = visible.gt(0);  // [B, H, R, C]
  const auto highest = blocks.masked_fill(seen.logical_not(), -kInf).amax(3, true);
  const auto lowest = blocks.masked_fill(seen.logical_not(), kInf).amin(3, true);
  const auto number = seen.sum(3, true).clamp_min(1);
  const auto mean = (blocks * seen.to(blocks.scalar_type())).sum(3, true) / number;
  const auto limit = ratio >= 0.0 ? ratio * highest + (1.0 - ratio) * mean
                                  : -ratio * lowest + (1.0 + ratio) * mean;
  // Rounding may put the mean of equal blocks above them all.
  return at::logical_and(seen, at::logical_or(blocks.ge(limit), blocks.eq(highest)));
}

at::Tensor three_product_scores(const at::Tensor& q, const at::Tensor& k, double resolution) {
  const auto fraction = [&](const at::Tensor& x) {
    const auto scaled = x * resolution;
    return (scaled - scaled.trunc()) / resolution;
  };
  return at::matmul(q, k.transpose(2, 3)) - at::matmul(fraction(q), fraction(k).transpose(2, 3));
}

at::Tensor hybrid_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& key_padding_mask,
                            const std::optional<at::Tensor>& query_padding_mask,
                            const std::optional<at::Tensor>& attn_mask, bool is_causal,
                            double resolution, int64_t block, std::optional<double> block_ratio,
                            bool approximate, int64_t added_keys) {
  const int64_t width = q.sym_size(3).guard_int(__FILE__, __LINE__);
  auto scores =
      (approximate ? three_product_scores(q, k, resolution) : at::matmul(q, k.transpose(2, 3))) /
      std::sqrt(static_cast<double>(std::max<int64_t>(width, 1)));  // [B, H, L, S]
  if (block_ratio) {
    const auto [blocks, visible, head] =
        integer_importance(q, k, key_padding_mask, query_padding_mask, attn_mask, is_causal,
                           resolution, block, false, added_keys);
    const auto stays = kept_blocks(blocks, visible, *block_ratio)
                           .repeat_interleave(fitting_block(block, scores), 2)
                           .repeat_interleave(fitting_block(block, scores), 3)
                           .narrow_symint(2, 0, q.sym_size(2))
                           .narrow_symint(3, 0, k.sym_size(2));
    scores = scores.masked_fill(stays.logical_not(), -kInf);
  }
  const auto mask = merge_masks(q, k, key_padding_mask, attn_mask, is_causal, added_keys);
  if (mask) {
    scores = scores + *mask;
  }
  // A row that may see no key at all has no distribution: zeros, as the fused kernels give.
  const auto blind = scores.detach().eq(-kInf).all(-1, true);
  const auto p = at::softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0);
  return at::matmul(p, v);
}

std::tuple<at::Tensor, at::Tensor> select_above(const at::Tensor& importance,
                                                const at::Tensor& threshold, int64_t min_heads) {
  TORCH_CHECK_VALUE(min_heads >= 0, "min_heads must not be negative, got ", min_heads);
  const auto num_heads = importance.sym_size(1).guard_int(__FILE__, __LINE__);
  const auto above = importance.detach().gt(threshold.to(importance.scalar_type()));  // [B, H]
  const auto count = above.sum(1).clamp(std::min(min_heads, num_heads), num_heads).to(at::kInt);
  return {select_heads(importance.detach(), count), count};
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("integer_importance", integer_importance);
  m.impl("kept_blocks", kept_blocks);
  m.impl("three_product_scores", three_product_scores);
  m.impl("hybrid_attention", hybrid_attention);
  m.impl("select_above", select_above);
}

}  // namespace headwise

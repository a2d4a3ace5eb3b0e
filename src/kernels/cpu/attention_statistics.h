// Entropy and confidence of attention rows, by tiles of keys, over raw pointers.
#pragma once

#include <cstdint>

namespace headwise::kernels {

/// q [L, d] and k [S, d] of every head by strides; everything in one compute type T.
template <typename T>
struct AttentionStatistics {
  int64_t batch, num_heads, kv_heads, queries, keys, width;
  T scale;
  bool causal;  ///< query i sees keys 0..i
  const T* q;   ///< [B, H, L, d], last stride 1
  int64_t q_batch, q_head, q_row;
  const T* k;  ///< [B, Hkv, S, d], last stride 1
  int64_t k_batch, k_head, k_row;
  const int64_t* lengths;     ///< [B] keys up to the last visible one
  const T* key_bias;          ///< [B, S] added to the scores, or null
  const bool* query_padding;  ///< [B, L], true: left out; or null
  const bool* mask_forbid;    ///< attn_mask by strides: true: may not attend
  const T* mask_add;          ///< or added to the scores
  int64_t mask_batch, mask_head, mask_row, mask_column;
};

constexpr int64_t kStatisticsQueries = 64;  ///< rows of a tile of scores
constexpr int64_t kStatisticsKeys = 256;    ///< its columns: 64 KB of float stay in the L2 cache

/// Adds up over the query rows [row, row + rows) of head (b, h), rows <= kStatisticsQueries, that
/// are not padding: sums[0] the normalised entropies, sums[1] the largest probabilities. `tile`
/// holds kStatisticsQueries * kStatisticsKeys elements.
template <typename T>
void attention_statistics_block(const AttentionStatistics<T>& a, int64_t b, int64_t h, int64_t row,
                                int64_t rows, T* tile, double sums[2]);

}  // namespace headwise::kernels

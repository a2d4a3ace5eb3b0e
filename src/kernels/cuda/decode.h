// One query per sequence against a long cache of keys and values: the cache is split along its
// keys, and the query heads of a sequence that share a key/value head read it together, four at a
// time. What no chosen head needs is not read.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/selection.h"

namespace headwise::kernels::cuda {

constexpr int kDecodeHeads = 4;       ///< query heads that share one pass over the cache
constexpr int64_t kDecodeKeys = 128;  ///< fewest keys of a split

/// How the keys are split.
struct DecodeShape {
  int64_t splits, keys_each;  ///< split s covers keys [s keys_each, (s + 1) keys_each)
};
HEADWISE_HOST_DEVICE DecodeShape decode_shape(int64_t batch, int64_t kv_heads, int64_t keys,
                                              int64_t blocks_wanted) {
  const int64_t units = batch * kv_heads > 0 ? batch * kv_heads : 1;
  int64_t splits = tiles_of(blocks_wanted, units);
  const int64_t most = tiles_of(keys, kDecodeKeys);
  splits = splits < most ? splits : most;
  splits = splits > 0 ? splits : 1;
  // Whole warps of keys, so that no split begins in the middle of one.
  const int64_t each = tiles_of(tiles_of(keys, splits), 32) * 32;
  return {each ? tiles_of(keys, each) + (keys == 0) : 1, each ? each : 32};
}

/// The head at place n of row b, -1: none. The index need not have been listed (work_list): a step
/// of decoding is short. What is out of range, or named twice, is left out here.
HEADWISE_HOST_DEVICE int64_t decode_head(const Chosen& chosen, int64_t b, int64_t n) {
  if (n >= clamp_count(chosen.count[b], chosen.columns)) return -1;
  const int32_t* const row = chosen.head + b * chosen.columns;
  bool valid = row[n] >= 0 && row[n] < chosen.num_heads;
  for (int64_t before = 0; before < n; ++before) valid &= row[before] != row[n];
  return valid ? row[n] : -1;
}

/// Block i: splits fastest, then passes of four heads, key/value heads, sequences.
struct DecodeTile {
  int64_t b, kv_head, pass, split;
};
HEADWISE_HOST_DEVICE int64_t decode_passes(const PairAttentionArguments& a) {
  return tiles_of(a.group, kDecodeHeads);
}
HEADWISE_HOST_DEVICE int64_t decode_blocks(const PairAttentionArguments& a,
                                           const DecodeShape& shape) {
  return a.chosen.batch * (a.chosen.num_heads / a.group) * decode_passes(a) * shape.splits;
}
HEADWISE_HOST_DEVICE DecodeTile decode_tile(const PairAttentionArguments& a,
                                            const DecodeShape& shape, int64_t block) {
  const int64_t passes = decode_passes(a), kv_heads = a.chosen.num_heads / a.group;
  const int64_t units = block / shape.splits, pairs = units / passes;
  return {pairs / kv_heads, pairs % kv_heads, units % passes, block % shape.splits};
}

/// The result of a split for a head: maximum, sum and weighted sum of the values.
HEADWISE_HOST_DEVICE int64_t decode_row(const PairAttentionArguments& a, const DecodeShape& shape,
                                        int64_t b, int64_t h, int64_t split) {
  return ((b * a.chosen.num_heads + h) * shape.splits + split) * (a.value_width + 2);
}
/// In elements of the accumulator type.
HEADWISE_HOST_DEVICE int64_t decode_scratch(const PairAttentionArguments& a,
                                            const DecodeShape& shape) {
  return a.chosen.batch * a.chosen.num_heads * shape.splits * (a.value_width + 2);
}

/// queries == 1, packed == false, no dropout, no added rows; of `chosen` the sizes, head and count,
/// which may be an index as it was given. partial: decode_scratch() elements.
int decode(const PairAttentionArguments& a, const DecodeShape& shape, void* partial, Stream stream);

}  // namespace headwise::kernels::cuda

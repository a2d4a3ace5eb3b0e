// The budget gate of an evaluated layer in two launches: the mean of the tokens that are not
// padding, then, with one block per sequence, budget, relevance and the top k. The formulas are
// those of kernels/budget_gate.h.
#pragma once

#include <cstdint>

#include "kernels/budget_gate.h"
#include "kernels/cuda/layer.h"
#include "kernels/selection.h"

namespace headwise::kernels::cuda {

constexpr int64_t kPoolRows = 128;     ///< tokens of a sequence that a block adds up
constexpr int64_t kPoolColumns = 256;  ///< and columns: 8 per lane
/// The features of a sequence are in the shared memory of one block.
constexpr int64_t kWidestGate = 8192, kMostGateHeads = 2048;

struct GateArguments {
  Element input_type, parameter_type;
  int64_t batch, rows, width, heads, hidden;
  Rows x;                       ///< [B, L, D]
  bool vectors;                 ///< x and the weights: 16 bytes at a time
  const bool* forbid;           ///< [B, L], true: padding; or null
  const void* add;              ///< [B, L] in accumulator type: a token counts exp(add); or null
  const void *mean, *variance;  ///< [D] in accumulator type
  const void *base, *relevance_weight;      ///< [H], [H, D]
  const void *hidden_weight, *hidden_bias;  ///< [h, D], [h]; null: the budget is fixed
  const void *out_weight, *out_bias;        ///< [h], [1]
  const void* progress;                     ///< [] in accumulator type, or null: 1
  double fixed_budget, min_budget, max_budget;
  double warmup, start_logit;  ///< logit(initial) - logit(keep) at progress 0, 0 at warmup
  int64_t min_heads;
  bool round_up;
  void* partial;  ///< scratch in accumulator type: pool_scratch()

  int32_t *index, *count;    ///< [B, H], [B]
  void* weight;              ///< [B, H] in input type: 1 where chosen
  void *relevance, *budget;  ///< [B, H], [B] in accumulator type
};

HEADWISE_HOST_DEVICE int64_t pool_splits(const GateArguments& a) {
  const int64_t splits = tiles_of(a.rows, kPoolRows);
  return splits ? splits : 1;
}
HEADWISE_HOST_DEVICE int64_t pool_blocks(const GateArguments& a) {
  return a.batch * pool_splits(a) * tiles_of(a.width, kPoolColumns);
}
/// Column tiles fastest, then splits of the tokens, then sequences.
struct PoolTile {
  int64_t b, split, column;
};
HEADWISE_HOST_DEVICE PoolTile pool_tile(const GateArguments& a, int64_t block) {
  const int64_t columns = tiles_of(a.width, kPoolColumns), rest = block / columns;
  return {rest / pool_splits(a), rest % pool_splits(a), block % columns * kPoolColumns};
}
/// Where split s of sequence b has its sums: D columns and the number of tokens.
HEADWISE_HOST_DEVICE int64_t pool_row(const GateArguments& a, int64_t b, int64_t split) {
  return (b * pool_splits(a) + split) * (a.width + 1);
}
HEADWISE_HOST_DEVICE int64_t pool_scratch(const GateArguments& a) {
  return a.batch * pool_splits(a) * (a.width + 1);
}

int budget_gate(const GateArguments& a, Stream stream);

}  // namespace headwise::kernels::cuda

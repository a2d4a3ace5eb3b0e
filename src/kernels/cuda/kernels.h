// CUDA kernels behind plain functions: device pointers, sizes, a stream; asynchronous, no torch.
// Each returns the error of its launch, cudaSuccess (0) if none.
#pragma once

#include <cstdint>

#include "kernels/cuda/indexing.h"

struct CUstream_st;  // cudaStream_t without the headers of CUDA

namespace headwise::kernels::cuda {

using Stream = CUstream_st*;
enum class Element { f64, f32, f16, bf16 };

/// relevance [B, H] -> index [B, H]: the count[b] heads of largest relevance, ascending, then -1.
/// NaN ranks below every number; counts are clamped to [0, H].
int select_heads(const void* relevance, Element type, const int64_t* count, int32_t* index,
                 int64_t batch, int64_t num_heads, Stream stream);

/// slot: scratch of shape.slots() int32. Counts are clamped to [0, K]; heads out of range and
/// repeats are left out silently: reporting them would wait for the device.
int work_list(const WorkListShape& shape, const int32_t* index, const int32_t* count, int32_t* slot,
              const WorkListOutput& out, Stream stream);

/// limit [B]: 1 + the last key that a key_padding_mask leaves visible, 0 if it leaves none; plain
/// [B]: the number of keys that it does not change, equal to limit if those come first. The mask
/// [B, S] is boolean (true: hidden) or, of the type C of `additive`, hides where it is
/// -inf.
int key_limits(const bool* forbid, const void* add, Element additive, int64_t batch, int64_t keys,
               int32_t* limit, int32_t* plain, Stream stream);

/// packed [N, R, w] = heads of `tensor` (gather), or the other way round (scatter). Elements of 2,
/// 4 or 8 bytes.
int gather_heads(const HeadCopyShape& shape, const void* tensor, int element_size,
                 const int32_t* batch, const int32_t* head, int64_t pairs, void* packed,
                 Stream stream);
int scatter_heads(const HeadCopyShape& shape, const void* packed, int element_size,
                  const int32_t* batch, const int32_t* head, int64_t pairs, void* tensor,
                  Stream stream);

/// Sums over tiles of kTileRows query rows; C is float, or double for Element::f64.
struct StatisticsArguments {
  Element type;  ///< of q and k
  int64_t batch, num_heads, kv_heads, queries, keys, width;
  double scale;
  bool causal;
  const void *q, *k;                 ///< by strides, in elements
  int64_t q_stride[4], k_stride[4];  ///< batch, head, row, column
  const bool* key_forbid;            ///< [B, S], true: may not attend; or null
  const void* key_add;               ///< [B, S] in C, added to the scores; or null
  const bool* query_padding;         ///< [B, L], true: left out; or null
  const bool* mask_forbid;           ///< attn_mask by strides
  const void* mask_add;              ///< attn_mask in C by strides
  int64_t mask_stride[4];
  double* sums;  ///< [B, H, tiles, 2]: entropies, confidences
};
int attention_statistics(const StatisticsArguments& arguments, Stream stream);

}  // namespace headwise::kernels::cuda

// The layer's forward over packed weights. Three rounds of small tasks, each handed out one at a
// time, so that work balances whatever heads the sequences chose: project the chosen heads' rows,
// attend, project out. Weights of a head are packed once a call, and only if some sequence chose
// it.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <memory>

#include "kernels/cpu/attention_packed.h"
#include "kernels/cpu/layer.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/softmax.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

constexpr int64_t kRowBlock = 128;  // rows of x that a projection task takes, where there are many
constexpr int64_t kLeastRows = 16;
constexpr int64_t kTasksPerWorker = 4;  // tasks differ in cost: several a worker even that out
constexpr int64_t kOutRows = 64;  // a tile of the output: rows and columns whose sums stay in L1
constexpr int64_t kOutColumns = 64;

}  // namespace

template <typename T>
bool packed_layer_supported(const Layer<T, float>& layer) {
  // Pairs of rows for bfloat16, whole vectors for speed.
  auto fits = [](int64_t width) { return width > 0 && width % 8 == 0; };
  return packed_gemm_supported<T>() && fits(layer.shape.width) && fits(layer.query.width) &&
         fits(layer.key.width) && fits(layer.value.width) && fits(layer.out_width);
}

template <typename T>
void layer_forward_packed(const Layer<T, float>& layer, const LayerWorkspace<T, float>& w,
                          T* output) {
  const auto& shape = layer.shape;
  const int64_t L = shape.queries, d = shape.width, E = shape.num_heads * d;
  const int64_t kv = (shape.keys + shape.added) * d, width = layer.out_width;
  const int64_t active = layer.active.size(), workers = at::get_num_threads();
  const UsedHeads used(layer.active, shape.num_heads);

  // [used][D, d] for query, key and value, and [used][d, Dout] for the output.
  struct Projection {
    const Rows<const T>& x;
    const T* weight;
    const float *bias, *row_bias;
    T* y;
    int64_t stride;
    std::unique_ptr<T[]> packed;
  };
  Projection projections[] = {
      {layer.query, layer.q_weight, layer.q_bias, nullptr, w.q, L * d, {}},
      {layer.key, layer.k_weight, layer.k_bias, layer.bias_k, w.k, kv, {}},
      {layer.value, layer.v_weight, layer.v_bias, layer.bias_v, w.v, kv, {}}};
  const int64_t heads = used.heads.size();
  for (auto& p : projections) p.packed.reset(new T[heads * p.x.width * d]);
  std::unique_ptr<T[]> out_packed(new T[heads * d * width]);
  parallel_tasks(heads * 4, [&](int64_t task, int64_t) {
    const int64_t n = task / 4, h = used.heads[n];
    if (task % 4 < 3) {
      auto& p = projections[task % 4];
      pack(p.x.width, d, p.weight + h * d * p.x.width, p.x.width, true,
           p.packed.get() + n * p.x.width * d);
    } else {
      pack(d, width, layer.out_weight + h * d, E, true, out_packed.get() + n * d * width);
    }
  });

  // Query, key and value rows of one block are projected by one task: x is read once. Where that
  // leaves workers idle, the three and the rows are divided up.
  const int64_t rows_at_most = std::max(L, shape.keys), wanted = kTasksPerWorker * workers;
  const int parts = workers > 1 && active * blocks(rows_at_most, kRowBlock) < wanted ? 3 : 1;
  int64_t row_block = kRowBlock;
  while (workers > 1 && row_block > kLeastRows &&
         active * parts * blocks(rows_at_most, row_block) < wanted)
    row_block /= 2;
  const int64_t row_blocks = blocks(rows_at_most, row_block);
  Scratch<float> tile(row_block * d, workers);
  parallel_tasks(active * row_blocks * parts, [&](int64_t task, int64_t worker) {
    const auto& a = layer.active[task / parts / row_blocks];
    const int64_t n = used.place[a.h], row = task / parts % row_blocks * row_block;
    const int64_t length = shape.lengths[a.b];
    const int begin = parts == 1 ? 0 : task % parts, end = parts == 1 ? 3 : begin + 1;
    for (int i = begin; i < end; ++i) {
      const auto& p = projections[i];
      const int64_t rows = std::min(row_block, (i == 0 ? L : length) - row);
      T* y = p.y + a.slot * p.stride;
      if (i > 0 && row == 0) {
        T* added = y + length * d;
        if (p.row_bias) {
          convert(p.row_bias + a.h * d, d, added);
          added += d;
        }
        if (layer.zero_row) std::fill_n(added, d, T(0.f));
      }
      if (rows <= 0) continue;
      packed_gemm(rows, d, p.x.width, p.x.at(a.b, row), p.x.row, p.packed.get() + n * p.x.width * d,
                  d, tile[worker], d, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* from = tile[worker] + r * d;
        if (p.bias) row_add(from, p.bias + a.h * d, d, from);
        convert(from, d, y + (row + r) * d);
      }
    }
    packed_gemm_done<T>();
  });

  // A task attends for a whole head where there are heads enough, so that its keys are packed once.
  const int64_t splits =
      active >= wanted || workers == 1 ? 1 : std::min<int64_t>(4, blocks(L, kQueryBlock));
  const int64_t chunk = blocks(blocks(L, kQueryBlock), std::max<int64_t>(splits, 1)) * kQueryBlock;
  Scratch<T> keys(packed_keys_size<T>(shape), workers);
  Scratch<std::byte> scratch((packed_attention_scratch<T>(shape) + 63) / 64 * 64, workers);
  parallel_tasks(L ? active * splits : 0, [&](int64_t task, int64_t worker) {
    const auto& a = layer.active[task / splits];
    const int64_t begin = task % splits * chunk, end = std::min(L, begin + chunk);
    if (begin >= end) return;
    pack_keys(shape, shape.lengths[a.b] + shape.added, w.k + a.slot * kv, d, w.v + a.slot * kv, d,
              keys[worker]);
    for (int64_t row = begin; row < end; row += kQueryBlock)
      packed_attention_forward(shape, a.b, a.h, w.q + a.slot * L * d, d, keys[worker], row,
                               std::min(kQueryBlock, end - row), w.context + (a.slot * L + row) * d,
                               d, w.lse + a.slot * L + row, scratch[worker]);
    packed_gemm_done<T>();
  });

  // The sum over a sequence's heads, tile by tile, in the order of the heads. Few blocks of rows
  // are divided up by columns too.
  const int64_t out_blocks = blocks(L, kOutRows), out_tasks = shape.batch * out_blocks;
  const int64_t column_tiles = blocks(width, kOutColumns);
  const int64_t column_splits =
      workers > 1 && out_tasks ? std::min(column_tiles, blocks(wanted, out_tasks)) : 1;
  const int64_t split_columns =
      blocks(column_tiles, std::max<int64_t>(column_splits, 1)) * kOutColumns;
  Scratch<float> sums(kOutRows * kOutColumns, workers);
  Scratch<T> weighted(kOutRows * d * std::max<int64_t>(shape.num_heads, 1), workers);
  parallel_tasks(out_tasks * column_splits, [&](int64_t task, int64_t worker) {
    const int64_t block = task / column_splits, first_column = task % column_splits * split_columns;
    const int64_t last_column = std::min(width, first_column + split_columns);
    if (first_column >= last_column) return;
    const int64_t b = block / out_blocks, row = block % out_blocks * kOutRows;
    const int64_t rows = std::min(kOutRows, L - row);
    const int64_t first = layer.first[b], chosen = layer.first[b + 1] - first;
    for (int64_t n = 0; n < chosen; ++n) {
      const auto& a = layer.active[first + n];
      const float weight = layer.head_weight[b * shape.num_heads + a.h];
      const T* context = w.context + (a.slot * L + row) * d;
      T* y = weighted[worker] + n * kOutRows * d;
      for (int64_t i = 0; i < rows * d; ++i) y[i] = T(float(context[i]) * weight);
    }
    float* c = sums[worker];
    for (int64_t column = first_column; column < last_column; column += kOutColumns) {
      const int64_t columns = std::min(kOutColumns, last_column - column);
      if (chosen == 0) std::fill_n(c, kOutRows * kOutColumns, 0.f);
      for (int64_t n = 0; n < chosen; ++n) {
        const T* packed = out_packed.get() + used.place[layer.active[first + n].h] * d * width;
        packed_gemm(rows, columns, d, weighted[worker] + n * kOutRows * d, d,
                    packed_at(packed, width, 0, column), width, c, kOutColumns, n > 0);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* from = c + i * kOutColumns;
        if (layer.out_bias) row_add(from, layer.out_bias + column, columns, from);
        convert(from, columns, output + (b * L + row + i) * width + column);
      }
    }
    packed_gemm_done<T>();
  });
}

#define HEADWISE_INSTANTIATE(T)                                                                  \
  template bool packed_layer_supported<T>(const Layer<T, float>&);                               \
  template void layer_forward_packed<T>(const Layer<T, float>&, const LayerWorkspace<T, float>&, \
                                        T*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

// The layer's forward over packed weights. A task takes a head of some sequences: it packs the
// head's weights where they stay in its cache, projects a sequence's rows and attends, and nothing
// but the context is left. The output projection is a second round. Where heads are too few for the
// workers, projection and attention are rounds of their own, divided up by rows.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cstddef>
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

constexpr int64_t kRowBlock = 128;  // rows of x that a product takes, where there are many
constexpr int64_t kLeastRows = 16;
constexpr int64_t kTasksPerWorker = 4;  // tasks differ in cost: several a worker even that out
constexpr int64_t kOutRows = 64;  // a tile of the output: rows and columns whose sums stay in L1
constexpr int64_t kOutColumns = 64;

template <typename T>
class Forward {
 public:
  Forward(const Layer<T, float>& layer, const LayerWorkspace<T, float>& workspace)
      : layer_(layer),
        shape_(layer.shape),
        w_(workspace),
        L_(shape_.queries),
        S_(shape_.keys + shape_.added),
        d_(shape_.width),
        active_(layer.active.size()),
        workers_(at::get_num_threads()),
        used_(layer.active, shape_.num_heads) {}

  void run(T* output) {
    if (active_ && L_) {
      if (workers_ == 1 || active_ >= 2 * workers_)
        by_heads();
      else
        by_rows();
    }
    project_out(output);
  }

 private:
  struct Input {
    const Rows<const T>& x;
    const T* weight;
    const float *bias, *row_bias;
    bool is_query;
  };
  std::array<Input, 3> inputs() const {
    return {{{layer_.query, layer_.q_weight, layer_.q_bias, nullptr, true},
             {layer_.key, layer_.k_weight, layer_.k_bias, layer_.bias_k, false},
             {layer_.value, layer_.v_weight, layer_.v_bias, layer_.bias_v, false}}};
  }
  int64_t given(const Input& in, const ActiveHead& a) const {
    return in.is_query ? L_ : shape_.lengths[a.b];
  }

  void pack_weight(const Input& in, int64_t h, T* packed) const {
    pack(in.x.width, d_, in.weight + h * d_ * in.x.width, in.x.width, true, packed);
  }

  /// Rows [row, row + rows) of one head's q, k or v, and after the last given one the added rows.
  void project(const Input& in, const ActiveHead& a, int64_t row, int64_t rows, const T* packed,
               T* y, float* tile) const {
    const int64_t length = given(in, a);
    if (!in.is_query && row == 0) {
      T* added = y + length * d_;
      if (in.row_bias) {
        convert(in.row_bias + a.h * d_, d_, added);
        added += d_;
      }
      if (layer_.zero_row) std::fill_n(added, d_, T(0.f));
    }
    const int64_t end = std::min(length, row + rows);
    for (; row < end; row += kRowBlock) {
      const int64_t n = std::min(kRowBlock, end - row);
      packed_gemm(n, d_, in.x.width, in.x.at(a.b, row), in.x.row, packed, d_, tile, d_, false);
      if (in.bias)
        for (int64_t r = 0; r < n; ++r)
          row_add(tile + r * d_, in.bias + a.h * d_, d_, tile + r * d_);
      convert(tile, n * d_, y + row * d_);
    }
  }

  /// What a worker attends with.
  struct Attention {
    Scratch<T> keys;
    Scratch<std::byte> scratch;
    Scratch<float> lse;
    Attention(const AttentionShape<float>& shape, int64_t workers)
        : keys(packed_keys_size<T>(shape), workers),
          scratch((packed_attention_scratch<T>(shape) + 63) / 64 * 64, workers),
          lse(shape.queries, workers) {}
  };
  void attend(const Attention& with, int64_t worker, const ActiveHead& a, const T* q, const T* k,
              const T* v, int64_t begin, int64_t end) const {
    T* keys = with.keys[worker];
    pack_keys(shape_, shape_.lengths[a.b] + shape_.added, k, d_, v, d_, keys);
    float* lse = w_.lse ? w_.lse + a.slot * L_ : with.lse[worker];
    for (int64_t row = begin; row < end; row += kQueryBlock)
      packed_attention_forward(shape_, a.b, a.h, q, d_, keys, row, std::min(kQueryBlock, end - row),
                               w_.context + (a.slot * L_ + row) * d_, d_, lse + row,
                               with.scratch[worker]);
  }

  /// Tasks of one head and some of the sequences that chose it.
  void by_heads() const {
    const auto positions = by_head(layer_.active, shape_.num_heads);
    const int64_t most = workers_ == 1 ? active_ : blocks(active_, 2 * kTasksPerWorker * workers_);
    struct Task {
      int64_t h, begin, end;
    };
    std::vector<Task> tasks;
    for (int64_t h = 0; h < shape_.num_heads; ++h)
      for (int64_t begin = 0, users = positions[h].size(); begin < users; begin += most)
        tasks.push_back({h, begin, std::min(users, begin + most)});

    const auto in = inputs();
    const int64_t weights = (in[0].x.width + in[1].x.width + in[2].x.width) * d_;
    Scratch<T> packed(weights, workers_);
    Scratch<T> rows(w_.q ? 0 : (L_ + 2 * S_) * d_, workers_);
    Scratch<float> tile(kRowBlock * d_, workers_);
    const Attention attention(shape_, workers_);
    parallel_tasks(tasks.size(), [&](int64_t task, int64_t worker) {
      const auto [h, begin, end] = tasks[task];
      T* packs[3] = {packed[worker]};
      for (int i = 0; i < 3; ++i) {
        if (i) packs[i] = packs[i - 1] + in[i - 1].x.width * d_;
        pack_weight(in[i], h, packs[i]);
      }
      for (int64_t n = begin; n < end; ++n) {
        const auto& a = layer_.active[positions[h][n]];
        T* q = w_.q ? w_.q + a.slot * L_ * d_ : rows[worker];
        T* k = w_.q ? w_.k + a.slot * S_ * d_ : q + L_ * d_;
        T* v = w_.q ? w_.v + a.slot * S_ * d_ : k + S_ * d_;
        T* y[3] = {q, k, v};
        for (int i = 0; i < 3; ++i)
          project(in[i], a, 0, given(in[i], a), packs[i], y[i], tile[worker]);
        attend(attention, worker, a, q, k, v, 0, L_);
      }
      packed_gemm_done<T>();
    });
  }

  /// Two rounds, divided up by rows: for fewer heads than keep the workers busy.
  void by_rows() const {
    std::unique_ptr<T[]> kept;
    T *q = w_.q, *k = w_.k, *v = w_.v;
    if (!q) {
      kept.reset(new T[active_ * (L_ + 2 * S_) * d_]);
      q = kept.get(), k = q + active_ * L_ * d_, v = k + active_ * S_ * d_;
    }
    const auto in = inputs();
    T* y[3] = {q, k, v};
    const int64_t heads = used_.heads.size(), wanted = kTasksPerWorker * workers_;
    std::unique_ptr<T[]> packed[3];
    for (int i = 0; i < 3; ++i) packed[i].reset(new T[heads * in[i].x.width * d_]);
    parallel_tasks(heads * 3, [&](int64_t task, int64_t) {
      const int64_t n = task / 3, i = task % 3;
      pack_weight(in[i], used_.heads[n], packed[i].get() + n * in[i].x.width * d_);
    });
    const int64_t rows = std::max(L_, shape_.keys);
    int64_t block = kRowBlock;
    while (block > kLeastRows && active_ * 3 * blocks(rows, block) < wanted) block /= 2;
    const int64_t row_blocks = blocks(rows, block);
    Scratch<float> tile(block * d_, workers_);
    parallel_tasks(active_ * 3 * row_blocks, [&](int64_t task, int64_t worker) {
      const auto& a = layer_.active[task / 3 / row_blocks];
      const int64_t i = task % 3, row = task / 3 % row_blocks * block;
      project(in[i], a, row, block, packed[i].get() + used_.place[a.h] * in[i].x.width * d_,
              y[i] + a.slot * (i ? S_ : L_) * d_, tile[worker]);
      packed_gemm_done<T>();
    });
    const int64_t splits = std::min<int64_t>(4, blocks(L_, kQueryBlock));
    const int64_t chunk = blocks(blocks(L_, kQueryBlock), splits) * kQueryBlock;
    const Attention attention(shape_, workers_);
    parallel_tasks(active_ * splits, [&](int64_t task, int64_t worker) {
      const auto& a = layer_.active[task / splits];
      const int64_t begin = task % splits * chunk;
      if (begin >= L_) return;
      attend(attention, worker, a, q + a.slot * L_ * d_, k + a.slot * S_ * d_, v + a.slot * S_ * d_,
             begin, std::min(L_, begin + chunk));
      packed_gemm_done<T>();
    });
  }

  /// The sum over a sequence's heads, tile by tile, in the order of the heads.
  void project_out(T* output) const {
    const int64_t width = layer_.out_width, heads = used_.heads.size();
    std::unique_ptr<T[]> packed(new T[heads * d_ * width]);  // [used][d, Dout]
    parallel_tasks(heads, [&](int64_t n, int64_t) {
      pack(d_, width, layer_.out_weight + used_.heads[n] * d_, shape_.num_heads * d_, true,
           packed.get() + n * d_ * width);
    });
    // Few blocks of rows are divided up by columns too.
    const int64_t row_blocks = blocks(L_, kOutRows), row_tasks = shape_.batch * row_blocks;
    if (row_tasks == 0) return;
    const int64_t tiles = blocks(width, kOutColumns);
    const int64_t splits =
        workers_ == 1 ? 1 : std::min(tiles, blocks(kTasksPerWorker * workers_, row_tasks));
    const int64_t split_columns = blocks(tiles, splits) * kOutColumns;
    Scratch<float> sums(kOutRows * kOutColumns, workers_);
    Scratch<T> weighted(kOutRows * d_ * std::max<int64_t>(shape_.num_heads, 1), workers_);
    parallel_tasks(row_tasks * splits, [&](int64_t task, int64_t worker) {
      const int64_t b = task / splits / row_blocks, row = task / splits % row_blocks * kOutRows;
      const int64_t begin = task % splits * split_columns;
      const int64_t end = std::min(width, begin + split_columns);
      if (begin >= end) return;
      const int64_t rows = std::min(kOutRows, L_ - row);
      const int64_t first = layer_.first[b], chosen = layer_.first[b + 1] - first;
      for (int64_t n = 0; n < chosen; ++n) {
        const auto& a = layer_.active[first + n];
        const float weight = layer_.head_weight[b * shape_.num_heads + a.h];
        const T* context = w_.context + (a.slot * L_ + row) * d_;
        T* y = weighted[worker] + n * kOutRows * d_;
        for (int64_t i = 0; i < rows * d_; ++i) y[i] = T(float(context[i]) * weight);
      }
      float* c = sums[worker];
      for (int64_t column = begin; column < end; column += kOutColumns) {
        const int64_t columns = std::min(kOutColumns, end - column);
        if (chosen == 0) std::fill_n(c, kOutRows * kOutColumns, 0.f);
        for (int64_t n = 0; n < chosen; ++n) {
          const T* right = packed.get() + used_.place[layer_.active[first + n].h] * d_ * width;
          packed_gemm(rows, columns, d_, weighted[worker] + n * kOutRows * d_, d_,
                      packed_at(right, width, 0, column), width, c, kOutColumns, n > 0);
        }
        for (int64_t i = 0; i < rows; ++i) {
          float* from = c + i * kOutColumns;
          if (layer_.out_bias) row_add(from, layer_.out_bias + column, columns, from);
          convert(from, columns, output + (b * L_ + row + i) * width + column);
        }
      }
      packed_gemm_done<T>();
    });
  }

  const Layer<T, float>& layer_;
  const AttentionShape<float>& shape_;
  const LayerWorkspace<T, float>& w_;
  const int64_t L_, S_, d_, active_, workers_;
  const UsedHeads used_;
};

}  // namespace

template <typename T>
bool packed_layer_supported(const Layer<T, float>& layer) {
  // Pairs of rows for bfloat16, whole vectors for speed.
  auto fits = [](int64_t width) { return width > 0 && width % 8 == 0; };
  return packed_gemm_supported<T>() && fits(layer.shape.width) && fits(layer.query.width) &&
         fits(layer.key.width) && fits(layer.value.width) && fits(layer.out_width);
}

template <typename T>
void layer_forward_packed(const Layer<T, float>& layer, const LayerWorkspace<T, float>& workspace,
                          T* output) {
  Forward<T>(layer, workspace).run(output);
}

#define HEADWISE_INSTANTIATE(T)                                                                  \
  template bool packed_layer_supported<T>(const Layer<T, float>&);                               \
  template void layer_forward_packed<T>(const Layer<T, float>&, const LayerWorkspace<T, float>&, \
                                        T*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

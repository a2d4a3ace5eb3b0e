// The layer's forward over packed weights. A task takes a head of some sequences: it packs the
// head's weights where they stay in its cache, projects a sequence's rows and attends, and nothing
// but the context is left. The output projection is a second round. If there are too few heads for
// the workers, projection and attention are separate rounds, divided by rows.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/cpu/attention_packed.h"
#include "kernels/cpu/layer.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/projection.h"
#include "kernels/cpu/softmax.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

constexpr int64_t kLeastRows = 16;

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
        longest_(std::max(L_, shape_.keys)),
        workers_(at::get_num_threads()),
        used_(layer.active, shape_.num_heads),
        positions_(by_head(layer.active, shape_.num_heads)) {}

  void run(T* output) {
    if (active_ && L_) {
      if (workers_ == 1 || active_ >= 2 * workers_)
        by_heads();
      else
        by_rows();
    }
    // The output projection is the second round.
    const ChosenHeads chosen{shape_.batch, shape_.num_heads, L_, d_, layer_.active, layer_.first};
    combine_heads_packed<T>(chosen, {w_.context, 0, 0, L_ * d_, d_},
                            {layer_.out_weight, layer_.out_width, shape_.num_heads * d_, true},
                            layer_.out_bias, layer_.head_weight, output);
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

  /// Whether a head has so few rows that its weights are read unpacked.
  bool is_thin(int64_t h) const { return int64_t(positions_[h].size()) * longest_ <= kThinRows; }

  /// A head's weights as project() takes them: `packed`, or null where they are not packed.
  const T* pack_weight(const Input& in, int64_t h, T* packed) const {
    if (is_thin(h)) return nullptr;
    pack(in.x.width, d_, in.weight + h * d_ * in.x.width, in.x.width, true, packed);
    return packed;
  }

  /// y [rows, d] = x W_h' of a head that is_thin(), over its unpacked weight [d, width].
  void multiply_thin(int64_t rows, const T* x, int64_t ldx, int64_t width, const T* weight,
                     float* y, int64_t ldy) const {
    const T* at[kThinRows];
    for (int64_t i = 0; i < rows; ++i) at[i] = x + i * ldx;
    thin_gemm(rows, d_, {width}, at, weight, width, y, ldy);
  }

  /// The same for any head.
  void multiply(const Input& in, int64_t h, int64_t rows, const T* x, int64_t ldx, const T* packed,
                float* y) const {
    const int64_t width = in.x.width;
    if (packed)
      packed_gemm(rows, d_, width, x, ldx, packed, d_, y, d_, false);
    else
      multiply_thin(rows, x, ldx, width, in.weight + h * d_ * width, y, d_);
  }

  const float* bias_of(const Input& in, int64_t h) const {
    return in.bias ? in.bias + h * d_ : nullptr;
  }

  /// bias_k or bias_v and the row of zeros, after the given keys.
  void append_rows(const Input& in, const ActiveHead& a, T* y) const {
    if (in.is_query) return;
    y += given(in, a) * d_;
    if (in.row_bias) {
      convert(in.row_bias + a.h * d_, d_, y);
      y += d_;
    }
    if (layer_.zero_row) std::fill_n(y, d_, T(0.f));
  }

  /// Rows [row, row + rows) of one head's q, k or v, and after the last given one the added rows.
  void project(const Input& in, const ActiveHead& a, int64_t row, int64_t rows, const T* packed,
               T* y, float* tile) const {
    const int64_t length = given(in, a);
    if (row == 0) append_rows(in, a, y);
    const int64_t end = std::min(length, row + rows);
    for (; row < end; row += kRowBlock) {
      const int64_t n = std::min(kRowBlock, end - row);
      multiply(in, a.h, n, in.x.at(a.b, row), in.x.row, packed, tile);
      convert_rows(n, d_, tile, d_, bias_of(in, a.h), y + row * d_, d_);
      round(y + row * d_, n);
    }
  }

  /// Rows as they are stored for backward, if that takes fewer bits than their sums.
  void round(T* rows, int64_t n) const {
    if constexpr (std::is_same_v<T, float>) {
      if (layer_.round) layer_.round(rows, n * d_);
    }
  }

  /// A worker's memory for attention.
  struct Attention {
    Scratch<T> keys;
    Scratch<std::byte> scratch;
    Attention(const AttentionShape<float>& shape, int64_t workers)
        : keys(packed_keys_size<T>(shape), workers),
          scratch((packed_attention_scratch<T>(shape) + 63) / 64 * 64, workers) {}
  };
  void attend(const Attention& with, int64_t worker, const ActiveHead& a, const T* q, const T* k,
              const T* v, int64_t begin, int64_t end) const {
    T* keys = with.keys[worker];
    pack_keys(shape_, shape_.lengths[a.b] + shape_.added, k, d_, v, d_, keys);
    float* lse = w_.lse ? w_.lse + a.slot * L_ : nullptr;
    for (int64_t row = begin; row < end; row += kQueryBlock)
      packed_attention_forward(shape_, a.b, a.h, q, d_, keys, row, std::min(kQueryBlock, end - row),
                               w_.context + (a.slot * L_ + row) * d_, d_, lse ? lse + row : nullptr,
                               with.scratch[worker]);
  }

  /// One head of some sequences: the q, k and v of each one.
  struct Group {
    const ActiveHead* heads[kRowBlock];
    T* rows[3][kRowBlock];
    int64_t size = 0;
  };
  /// A worker's memory for projections.
  struct Projection {
    Scratch<T> packed, gathered;
    Scratch<float> tile;  // [kRowBlock, 3 d]
  };

  /// Whether query, key and value are one input, so that one product gives q, k and v. They may
  /// begin at the same address and still differ: the first tokens may attend to all.
  bool is_self() const {
    const auto& x = layer_.query;
    auto same = [&](const Rows<const T>& y) {
      return x.data == y.data && x.batch == y.batch && x.row == y.row && x.width == y.width;
    };
    return L_ == shape_.keys && same(layer_.key) && same(layer_.value);
  }

  /// tile [rows, parts, d] = the first `parts` of q, k and v of some rows of x, in the self form
  /// and without their biases.
  void multiply_self(int64_t h, int parts, int64_t rows, const T* x, int64_t ldx, const T* packed,
                     float* tile) const {
    const auto in = inputs();
    const int64_t width = layer_.query.width, ld = parts * d_;
    if (packed)
      packed_gemm(rows, ld, width, x, ldx, packed, 3 * d_, tile, ld, false);
    else
      for (int i = 0; i < parts; ++i)
        multiply_thin(rows, x, ldx, width, in[i].weight + h * d_ * width, tile + i * d_, ld);
  }

  /// Rows of a tile, with biases, to the rows of one sequence, from row `row` on.
  void scatter(const Group& group, int64_t m, int parts, int64_t row, int64_t rows,
               const float* tile) const {
    const auto in = inputs();
    for (int i = 0; i < parts; ++i) {
      convert_rows(rows, d_, tile + i * d_, parts * d_, bias_of(in[i], group.heads[m]->h),
                   group.rows[i][m] + row * d_, d_);
      round(group.rows[i][m] + row * d_, rows);
    }
  }

  /// q, k and v of a group in the self form: all three of the given rows, q alone of padding. Short
  /// sequences are multiplied as one matrix: products of a few rows each would read the weights
  /// again and again.
  void project_self(const Group& group, const T* packed, T* gathered, float* tile) const {
    const auto& x = layer_.query;
    const int64_t h = group.heads[0]->h;
    for (const int parts : {3, 1}) {
      auto range = [&](int64_t m) {
        const int64_t length = shape_.lengths[group.heads[m]->b];
        return parts == 3 ? std::pair<int64_t, int64_t>(0, length)
                          : std::pair<int64_t, int64_t>(length, L_);
      };
      if (group.size == 1) {
        for (auto [row, end] = range(0); row < end; row += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, end - row);
          multiply_self(h, parts, rows, x.at(group.heads[0]->b, row), x.row, packed, tile);
          scatter(group, 0, parts, row, rows, tile);
        }
        continue;
      }
      T* to = gathered;
      for (int64_t m = 0; m < group.size; ++m)
        for (auto [row, end] = range(m); row < end; ++row)
          to = std::copy_n(x.at(group.heads[m]->b, row), x.width, to);
      const int64_t rows = (to - gathered) / x.width;
      if (rows == 0) continue;
      multiply_self(h, parts, rows, gathered, x.width, packed, tile);
      const float* from = tile;
      for (int64_t m = 0; m < group.size; ++m) {
        const auto [row, end] = range(m);
        scatter(group, m, parts, row, end - row, from);
        from += (end - row) * parts * d_;
      }
    }
  }

  /// Packs a head's weights: in the self form side by side, [D, 3 d]. Null if they are read
  /// unpacked.
  std::array<const T*, 3> pack_weights(int64_t h, T* packed) const {
    const auto in = inputs();
    if (is_thin(h)) return {};
    if (is_self()) {
      const int64_t width = layer_.query.width;
      const int64_t packed_step = packed_at(packed, 0, 0, d_) - packed;
      for (int64_t i = 0; i < 3; ++i)
        pack(width, d_, in[i].weight + h * d_ * width, width, true, packed + i * packed_step,
             3 * d_);
      return {packed, packed, packed};
    }
    std::array<const T*, 3> packs;
    for (int64_t i = 0, at = 0; i < 3; at += in[i++].x.width * d_)
      packs[i] = pack_weight(in[i], h, packed + at);
    return packs;
  }

  /// Tasks of one head and some of the sequences that chose it.
  void by_heads() const {
    const int64_t most = workers_ == 1 ? active_ : blocks(active_, 2 * kTasksPerWorker * workers_);
    const auto tasks = head_tasks(positions_, most);

    const auto in = inputs();
    const bool self = is_self();
    const int64_t weights = (in[0].x.width + in[1].x.width + in[2].x.width) * d_;
    const int64_t head_rows = (L_ + 2 * S_) * d_;
    const int64_t together =
        self && longest_ <= kRowBlock / 2 ? std::min(most, kRowBlock / longest_) : 1;
    const Projection projection{{weights, workers_},
                                {together > 1 ? kRowBlock * layer_.query.width : 0, workers_},
                                {kRowBlock * 3 * d_, workers_}};
    Scratch<T> rows(w_.q ? 0 : head_rows * together, workers_);
    const Attention attention(shape_, workers_);
    parallel_tasks(tasks.size(), [&](int64_t task, int64_t worker) {
      const auto [h, begin, end] = tasks[task];
      const auto packs = pack_weights(h, projection.packed[worker]);
      float* tile = projection.tile[worker];
      Group group;
      for (int64_t first = begin; first < end; first += together) {
        group.size = std::min(together, end - first);
        for (int64_t m = 0; m < group.size; ++m) {
          const auto& a = layer_.active[positions_[h][first + m]];
          group.heads[m] = &a;
          T* scratch = w_.q ? nullptr : rows[worker] + m * head_rows;
          group.rows[0][m] = w_.q ? w_.q + a.slot * L_ * d_ : scratch;
          group.rows[1][m] = w_.q ? w_.k + a.slot * S_ * d_ : scratch + L_ * d_;
          group.rows[2][m] = w_.q ? w_.v + a.slot * S_ * d_ : scratch + (L_ + S_) * d_;
        }
        if (self) project_self(group, packs[0], projection.gathered[worker], tile);
        for (int i = 0; i < 3; ++i)
          for (int64_t m = 0; m < group.size; ++m) {
            const auto& a = *group.heads[m];
            if (self)
              append_rows(in[i], a, group.rows[i][m]);
            else
              project(in[i], a, 0, given(in[i], a), packs[i], group.rows[i][m], tile);
          }
        for (int64_t m = 0; m < group.size; ++m)
          attend(attention, worker, *group.heads[m], group.rows[0][m], group.rows[1][m],
                 group.rows[2][m], 0, L_);
      }
      packed_gemm_done<T>();
    });
  }

  /// Two rounds, divided by rows: for too few heads to keep the workers busy.
  void by_rows() const {
    Array<T> kept;
    T *q = w_.q, *k = w_.k, *v = w_.v;
    if (!q) {
      kept = Array<T>(active_ * (L_ + 2 * S_) * d_);
      q = kept.get(), k = q + active_ * L_ * d_, v = k + active_ * S_ * d_;
    }
    const auto in = inputs();
    T* y[3] = {q, k, v};
    const int64_t heads = used_.heads.size(), wanted = kTasksPerWorker * workers_;
    Array<T> packed[3];
    for (int i = 0; i < 3; ++i) packed[i] = Array<T>(heads * in[i].x.width * d_);
    std::vector<const T*> packs(heads * 3);
    parallel_tasks(heads * 3, [&](int64_t task, int64_t) {
      const int64_t n = task / 3, i = task % 3;
      packs[task] = pack_weight(in[i], used_.heads[n], packed[i].get() + n * in[i].x.width * d_);
    });
    int64_t block = kRowBlock;
    while (block > kLeastRows && active_ * 3 * blocks(longest_, block) < wanted) block /= 2;
    const int64_t row_blocks = blocks(longest_, block);
    Scratch<float> tile(block * d_, workers_);
    parallel_tasks(active_ * 3 * row_blocks, [&](int64_t task, int64_t worker) {
      const auto& a = layer_.active[task / 3 / row_blocks];
      const int64_t i = task % 3, row = task / 3 % row_blocks * block;
      project(in[i], a, row, block, packs[used_.place[a.h] * 3 + i],
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

  const Layer<T, float>& layer_;
  const AttentionShape<float>& shape_;
  const LayerWorkspace<T, float>& w_;
  const int64_t L_, S_, d_, active_, longest_, workers_;
  const UsedHeads used_;
  const std::vector<std::vector<int64_t>> positions_;  // by head, in `active`
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

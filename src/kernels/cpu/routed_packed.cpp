// The forward over packed weights. A task takes a head of some sequences: it packs the head's
// weights where they stay in its cache, projects a sequence's keys and values and then the queries
// of the tokens that chose the head, which attend. The output projection is a second round. If
// there are too few heads for the workers, queries are a round of their own, divided by rows.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstddef>

#include "kernels/cpu/attention_packed.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/routed.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

template <typename T>
class RoutedForward {
 public:
  RoutedForward(const RoutedLayer<T, float>& routed, T* context)
      : routed_(routed),
        layer_(routed.layer),
        shape_(layer_.shape),
        context_(context),
        L_(shape_.queries),
        S_(shape_.keys + shape_.added),
        d_(shape_.width),
        active_(layer_.active.size()),
        workers_(at::get_num_threads()),
        keys_size_(packed_keys_size<T>(shape_)),
        together_(layer_.key.data == layer_.value.data && layer_.key.batch == layer_.value.batch &&
                  layer_.key.row == layer_.value.row && layer_.key.width == layer_.value.width),
        weights_((layer_.query.width + layer_.key.width + layer_.value.width) * d_, workers_),
        gathered_(kRowBlock * layer_.query.width, workers_),
        rows_((L_ + 2 * S_) * d_, workers_),
        tile_(kRowBlock * 2 * d_, workers_),
        attention_((packed_attention_scratch<T>(shape_) + 63) / 64 * 64, workers_) {}

  void run(T* output) const {
    if (workers_ == 1 || active_ >= 2 * workers_)
      by_heads();
    else
      by_rows();
    combine(output);
  }

 private:
  const T* pack_query_weight(int64_t h, int64_t worker) const {
    const int64_t width = layer_.query.width;
    T* packed = weights_[worker];
    pack(width, d_, layer_.q_weight + h * d_ * width, width, true, packed);
    return packed;
  }
  /// Keys' and values' weights; of one input side by side, [D, 2 d].
  const T* pack_key_weights(int64_t h, int64_t worker) const {
    const int64_t width = layer_.key.width, other = layer_.value.width;
    T* packed = weights_[worker] + layer_.query.width * d_;
    const int64_t ld = together_ ? 2 * d_ : d_;
    pack(width, d_, layer_.k_weight + h * d_ * width, width, true, packed, ld);
    pack(other, d_, layer_.v_weight + h * d_ * other, other, true, values_of(packed), ld);
    return packed;
  }
  T* values_of(T* packed) const {
    return packed + (together_ ? packed_at(packed, 0, 0, d_) - packed : layer_.key.width * d_);
  }

  static const float* of_head(const float* x, int64_t h, int64_t d) { return x ? x + h * d : x; }

  /// The keys and values of an active head, packed for attention.
  void make_keys(const ActiveHead& a, const T* packed, int64_t worker, T* keys) const {
    const int64_t length = shape_.lengths[a.b];
    T *k = rows_[worker] + L_ * d_, *v = k + S_ * d_;
    float* const tile = tile_[worker];
    const auto store = [&](const float* from, int64_t ld, const float* bias, int64_t row,
                           int64_t rows, T* to) {
      convert_rows(rows, d_, from, ld, of_head(bias, a.h, d_), to + row * d_, d_);
    };
    for (int64_t row = 0; row < length; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, length - row);
      if (together_) {
        packed_gemm(rows, 2 * d_, layer_.key.width, layer_.key.at(a.b, row), layer_.key.row, packed,
                    2 * d_, tile, 2 * d_, false);
        store(tile, 2 * d_, layer_.k_bias, row, rows, k);
        store(tile + d_, 2 * d_, layer_.v_bias, row, rows, v);
      } else {
        packed_gemm(rows, d_, layer_.key.width, layer_.key.at(a.b, row), layer_.key.row, packed, d_,
                    tile, d_, false);
        store(tile, d_, layer_.k_bias, row, rows, k);
        packed_gemm(rows, d_, layer_.value.width, layer_.value.at(a.b, row), layer_.value.row,
                    packed + layer_.key.width * d_, d_, tile, d_, false);
        store(tile, d_, layer_.v_bias, row, rows, v);
      }
    }
    const auto append = [&](const float* bias, T* y) {
      if (bias) {
        convert(bias + a.h * d_, d_, y);
        y += d_;
      }
      if (layer_.zero_row) std::fill_n(y, d_, T(0.f));
    };
    append(layer_.bias_k, k + length * d_);
    append(layer_.bias_v, v + length * d_);
    pack_keys(shape_, length + shape_.added, k, d_, v, d_, keys);
  }

  /// The context of active head n for the tokens [begin, end) of those that chose it.
  void attend(int64_t n, int64_t begin, int64_t end, const T* packed, const T* keys,
              int64_t worker) const {
    const auto& a = layer_.active[n];
    const auto own = routed_.shape(n);
    const int64_t width = layer_.query.width;
    T* const q = rows_[worker];
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, end - row);
      gather_rows(layer_.query, a.b, own.places + row, rows, gathered_[worker]);
      packed_gemm(rows, d_, width, gathered_[worker], width, packed, d_, tile_[worker], d_, false);
      convert_rows(rows, d_, tile_[worker], d_, of_head(layer_.q_bias, a.h, d_), q + row * d_, d_);
    }
    T* const context = context_ + routed_.begin[n] * d_;
    for (int64_t row = begin; row < end; row += kQueryBlock)
      packed_attention_forward<T>(own, a.b, a.h, q, d_, keys, row, std::min(kQueryBlock, end - row),
                                  context + row * d_, d_, nullptr, attention_[worker]);
  }

  void by_heads() const {
    const auto positions = by_head(layer_.active, shape_.num_heads);
    const int64_t most = workers_ == 1 ? active_ : blocks(active_, 2 * kTasksPerWorker * workers_);
    const auto tasks = head_tasks(positions, most);
    const Scratch<T> keys(keys_size_, workers_);
    parallel_tasks(tasks.size(), [&](int64_t task, int64_t worker) {
      const auto [h, begin, end] = tasks[task];
      const T* const query_weight = pack_query_weight(h, worker);
      const T* const key_weights = pack_key_weights(h, worker);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = positions[h][i];
        make_keys(layer_.active[n], key_weights, worker, keys[worker]);
        attend(n, 0, routed_.count(n), query_weight, keys[worker], worker);
      }
      packed_gemm_done<T>();
    });
  }

  void by_rows() const {
    const Scratch<T> keys(keys_size_, active_);
    parallel_tasks(active_, [&](int64_t n, int64_t worker) {
      const auto& a = layer_.active[n];
      make_keys(a, pack_key_weights(a.h, worker), worker, keys[n]);
      packed_gemm_done<T>();
    });
    const int64_t splits = std::min<int64_t>(4, blocks(L_, kQueryBlock));
    parallel_tasks(active_ * splits, [&](int64_t task, int64_t worker) {
      const int64_t n = task / splits, count = routed_.count(n);
      const int64_t chunk = blocks(blocks(count, kQueryBlock), splits) * kQueryBlock;
      const int64_t begin = task % splits * chunk;
      if (begin >= count) return;
      attend(n, begin, std::min(count, begin + chunk),
             pack_query_weight(layer_.active[n].h, worker), keys[n], worker);
      packed_gemm_done<T>();
    });
  }

  /// The output projection. The rows of a head within a block of tokens follow one another: a
  /// product of each head, whose rows are added where the tokens are.
  void combine(T* output) const {
    const int64_t width = layer_.out_width, row_blocks = blocks(L_, kRowBlock);
    const int64_t size = packed_size<T>(d_, width);
    const UsedHeads used(layer_.active, shape_.num_heads);
    const Array<T> packed(used.heads.size() * size);
    parallel_tasks(used.heads.size(), [&](int64_t n, int64_t) {
      pack(d_, width, layer_.out_weight + used.heads[n] * d_, shape_.num_heads * d_, true,
           packed.get() + n * size);
    });
    const Scratch<T> weighted(kRowBlock * d_, workers_);
    const Scratch<float> sums(kRowBlock * width, workers_), products(kRowBlock * width, workers_);
    parallel_tasks(shape_.batch * row_blocks, [&](int64_t task, int64_t worker) {
      const int64_t b = task / row_blocks, row = task % row_blocks * kRowBlock;
      const int64_t rows = std::min(kRowBlock, L_ - row);
      float* const sum = sums[worker];
      std::fill_n(sum, rows * width, 0.f);
      for (int64_t n = layer_.first[b]; n < layer_.first[b + 1]; ++n) {
        const auto& a = layer_.active[n];
        const auto [begin, end] = routed_.within(n, row, rows);
        if (begin == end) continue;
        for (int64_t i = begin; i < end; ++i)
          scale(context_ + i * d_, d_,
                layer_.head_weight[routed_.weight_place(a, routed_.tokens[i])],
                weighted[worker] + (i - begin) * d_);
        packed_gemm(end - begin, width, d_, weighted[worker], d_,
                    packed.get() + used.place[a.h] * size, width, products[worker], width, false);
        for (int64_t i = begin; i < end; ++i) {
          float* const to = sum + (routed_.tokens[i] - row) * width;
          convert_rows(1, width, products[worker] + (i - begin) * width, width, to, to, width);
        }
      }
      convert_rows(rows, width, sum, width, layer_.out_bias, output + (b * L_ + row) * width,
                   width);
      packed_gemm_done<T>();
    });
  }

  const RoutedLayer<T, float>& routed_;
  const Layer<T, float>& layer_;
  const AttentionShape<float>& shape_;
  T* const context_;
  const int64_t L_, S_, d_, active_, workers_, keys_size_;
  const bool together_;  // keys and values are of one input
  // A worker's memory: packed weights, rows of the input, q, k and v, and products.
  const Scratch<T> weights_, gathered_, rows_;
  const Scratch<float> tile_;
  const Scratch<std::byte> attention_;
};

}  // namespace

template <typename T>
void routed_forward_packed(const RoutedLayer<T, float>& routed, T* context, T* output) {
  RoutedForward<T>(routed, context).run(output);
}

template void routed_forward_packed<float>(const RoutedLayer<float, float>&, float*, float*);
template void routed_forward_packed<BFloat16>(const RoutedLayer<BFloat16, float>&, BFloat16*,
                                              BFloat16*);

}  // namespace headwise::kernels

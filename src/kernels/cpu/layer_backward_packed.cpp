// The layer's backward over packed operands: the chosen heads' attention, then the inputs'
// gradients (a sum over a sequence's heads), then the weights' (a sum over the sequences that chose
// a head).
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <type_traits>

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

constexpr int64_t kRows = 64;                  // rows of a gradient that one task sums
constexpr int64_t kColumns = kProductColumns;  // and its columns: the tile stays in L1

template <typename T>
class Backward {
 public:
  Backward(const Layer<T, float>& layer, const LayerWorkspace<const T, const float>& workspace,
           const T* grad_output, const LayerGradients<T, float>& gradients)
      : layer_(layer),
        shape_(layer.shape),
        w_(workspace),
        grad_output_(grad_output),
        g_(gradients),
        used_(layer.active, shape_.num_heads),
        L_(shape_.queries),
        S_(shape_.keys + shape_.added),
        d_(shape_.width),
        E_(shape_.num_heads * shape_.width),
        out_(layer.out_width),
        active_(layer.active.size()),
        q_size_(L_ * d_ + d_ * even(L_)),
        kv_size_(S_ * d_ + d_ * even(S_)),
        memory_(active_ * (q_size_ + 2 * kv_size_)) {}

  void run() {
    attention();
    inputs();
    weights();
    if (g_.out_bias) out_bias();
  }

 private:
  HeadGradients<T> head_gradients(int64_t n) const {
    T* q = memory_.get() + n * (q_size_ + 2 * kv_size_);
    T* k = q + q_size_;
    T* v = k + kv_size_;
    return {q, k, v, q + L_ * d_, k + S_ * d_, v + S_ * d_};
  }

  /// Gradients of the chosen heads' queries, keys and values, and of their weights. delta is that
  /// of the gradient as it is stored: of another rounding, it would not cancel where one
  /// probability is nearly 1, and large queries and keys multiply what is left.
  void attention() {
    const int64_t workers = at::get_num_threads(), heads = used_.heads.size();
    Factors<T> out_weights(heads, out_, d_);
    parallel_tasks(heads, [&](int64_t n, int64_t) {
      out_weights.set(n, out_, layer_.out_weight + used_.heads[n] * d_, E_);
    });
    Scratch<float> floats(L_ + kRows * d_, workers);
    Scratch<T> contexts(L_ * d_, workers);
    Scratch<std::byte> scratch(packed_backward_scratch<T>(shape_), workers);
    const auto head_gradient = [&](int64_t n, int64_t copy, int64_t worker) {
      const auto& a = layer_.active[n];
      const float weight = layer_.head_weight[a.b * shape_.num_heads + a.h];
      const int64_t place = used_.place[a.h];
      float *delta = floats[worker], *tile = delta + L_;
      const T* context = w_.context + a.slot * L_ * d_;
      T* grad_context = contexts[worker];
      float total = 0;
      for (int64_t row = 0; row < L_; row += kRows) {
        const int64_t rows = std::min(kRows, L_ - row);
        for (int64_t column = 0; column < d_; column += kColumns)
          packed_gemm(rows, std::min(kColumns, d_ - column), out_,
                      grad_output_ + (a.b * L_ + row) * out_, out_,
                      out_weights.panel(place, column), out_weights.row_length(place),
                      tile + column, d_, false);
        for (int64_t i = 0; i < rows; ++i)
          total += dot(tile + i * d_, context + (row + i) * d_, d_);
        scale(tile, rows * d_, weight, tile);
        convert(tile, rows * d_, grad_context + row * d_);
        for (int64_t i = row; i < row + rows; ++i)
          delta[i] = dot(grad_context + i * d_, context + i * d_, d_);
      }
      if (g_.head_weight) g_.head_weight[a.b * shape_.num_heads + a.h] = total;
      const int64_t kv = S_ * d_;
      const HeadTensors<T> head{
          a.b, a.h, w_.q + a.slot * L_ * d_, w_.k + a.slot * kv, w_.v + a.slot * kv, d_, d_, d_};
      packed_attention_backward(shape_, head, grad_context, d_, delta, w_.lse + a.slot * L_,
                                g_.mask, g_.mask.of(copy, a.b, a.h), head_gradients(n),
                                scratch[worker]);
    };
    const auto lists = by_mask_part(layer_.active, shape_, g_.mask);
    parallel_tasks(lists.size(), [&](int64_t list, int64_t worker) {
      for (const int64_t n : lists[list]) head_gradient(n, g_.mask.copies > 1 ? list : 0, worker);
      packed_gemm_done<T>();
    });
  }

  struct Input {
    const Rows<const T>& x;
    const T* weight;
    T *dx, *dweight;
    float *dbias, *row_bias;
    int part;  // 0 query, 1 key, 2 value
  };
  using Inputs = std::vector<Input>;
  Inputs projections() const {
    return {{layer_.query, layer_.q_weight, g_.query, g_.q_weight, g_.q_bias, nullptr, 0},
            {layer_.key, layer_.k_weight, g_.key, g_.k_weight, g_.k_bias, g_.bias_k, 1},
            {layer_.value, layer_.v_weight, g_.value, g_.v_weight, g_.v_bias, g_.bias_v, 2}};
  }
  /// Neighbouring projections that are alike: in the self form all three.
  template <typename Same>
  static std::vector<Inputs> grouped(const Inputs& inputs, const Same& same) {
    std::vector<Inputs> groups;
    for (const auto& in : inputs)
      if (!groups.empty() && same(groups.back()[0], in))
        groups.back().push_back(in);
      else
        groups.push_back({in});
    return groups;
  }
  /// Rows of an input of sequence b that were projected.
  int64_t given(const Input& in, int64_t b) const { return in.part ? shape_.lengths[b] : L_; }
  const T* rows_of(const Input& in, int64_t n) const {
    const auto heads = head_gradients(n);
    return in.part == 0 ? heads.q : in.part == 1 ? heads.k : heads.v;
  }
  const T* turned_of(const Input& in, int64_t n) const {
    const auto heads = head_gradients(n);
    return in.part == 0 ? heads.q_turned : in.part == 1 ? heads.k_turned : heads.v_turned;
  }

  /// The inputs' gradients: a block of rows by one worker, heads in their order.
  void inputs() {
    for (const auto& group :
         grouped(projections(), [](const Input& a, const Input& b) { return a.dx == b.dx; }))
      if (group[0].dx) input(group);
  }

  /// The gradient of one input: floats are summed where they belong, over the weights as they lie,
  /// bfloat16 in tiles, all projections side by side in each product.
  void input(const Inputs& group) {
    const int64_t length = group[0].part ? shape_.keys : L_;
    const auto by_block = [&](int64_t block, const auto& sum) {
      const int64_t row_blocks = blocks(length, block);
      parallel_tasks(shape_.batch * row_blocks, [&](int64_t task, int64_t worker) {
        const int64_t b = task / row_blocks, row = task % row_blocks * block;
        const int64_t rows = std::min(block, length - row);
        T* dx = group[0].dx + (b * length + row) * group[0].x.width;
        sum(b, row, rows, dx, worker);
        packed_gemm_done<T>();
      });
    };
    if constexpr (Factors<T>::kPacked)
      packed_input(group, by_block);
    else
      by_block(kRowBlock, [&](int64_t b, int64_t row, int64_t rows, float* dx, int64_t) {
        add_input(group, b, row, rows, dx);
      });
  }

  /// dx [rows, width] of one sequence's rows from `row` on.
  void add_input(const Inputs& group, int64_t b, int64_t row, int64_t rows, float* dx) const {
    const int64_t width = group[0].x.width, begin = layer_.first[b], end = layer_.first[b + 1];
    // Padding has no keys and values, and the first projection has the most rows.
    const auto projected = [&](const Input& in) {
      return std::clamp<int64_t>(given(in, b) - row, 0, rows);
    };
    const int64_t most = begin < end ? projected(group[0]) : 0;
    std::fill_n(dx + most * width, (rows - most) * width, 0.f);
    for (int64_t column = 0; most && column < width; column += kColumns) {
      bool add = false;
      for (int64_t n = begin; n < end; ++n)
        for (const auto& in : group) {
          if (const int64_t m = projected(in))
            packed_gemm(m, std::min(kColumns, width - column), d_, rows_of(in, n) + row * d_, d_,
                        in.weight + layer_.active[n].h * d_ * width + column, width, dx + column,
                        width, add);
          add = true;
        }
    }
  }

  template <typename ByBlock>
  void packed_input(const Inputs& group, const ByBlock& by_block) const {
    const int64_t heads = used_.heads.size(), workers = at::get_num_threads();
    const int64_t width = group[0].x.width, parts = group.size(), terms = parts * d_;
    Factors<T> weights(heads, terms, width);
    parallel_tasks(heads * parts, [&](int64_t task, int64_t) {
      const int64_t n = task / parts, i = task % parts;
      weights.set(n, d_, group[i].weight + used_.heads[n] * d_ * width, width, i * d_);
    });
    Scratch<float> sums(kRows * kColumns, workers);
    Scratch<T> lefts(shape_.num_heads * kRows * terms, workers);
    by_block(kRows, [&](int64_t b, int64_t row, int64_t rows, T* dx, int64_t worker) {
      const int64_t begin = layer_.first[b], end = layer_.first[b + 1];
      for (int64_t n = begin; n < end; ++n)
        for (int64_t i = 0; i < parts; ++i) {
          const T* from = rows_of(group[i], n) + row * d_;
          T* to = lefts[worker] + (n - begin) * kRows * terms + i * d_;
          const int64_t projected = std::min(rows, given(group[i], b) - row);
          for (int64_t r = 0; r < rows; ++r, from += d_, to += terms)
            if (r < projected)
              std::copy_n(from, d_, to);
            else
              std::fill_n(to, d_, T(0.f));
        }
      if (begin == end) std::fill_n(dx, rows * width, T(0.f));
      for (int64_t column = 0; begin < end && column < width; column += kColumns) {
        const int64_t columns = std::min(kColumns, width - column);
        for (int64_t n = begin; n < end; ++n) {
          const int64_t place = used_.place[layer_.active[n].h];
          packed_gemm(rows, columns, terms, lefts[worker] + (n - begin) * kRows * terms, terms,
                      weights.panel(place, column), weights.row_length(place), sums[worker],
                      kColumns, n > begin);
        }
        convert_rows(rows, columns, sums[worker], kColumns, nullptr, dx + column, width);
      }
    });
  }

  /// The weights' gradients: one worker per head and matrix, sequences in their order.
  void weights() {
    const auto positions = by_head(layer_.active, shape_.num_heads);
    const int64_t batch = shape_.batch;
    const bool padded = std::any_of(shape_.lengths, shape_.lengths + batch,
                                    [this](int64_t length) { return length < L_; });
    const auto same_rows = [&](const Input& a, const Input& b) {
      const bool as_many = bool(a.part) == bool(b.part) || (L_ == shape_.keys && !padded);
      return as_many && a.x.data == b.x.data && a.x.batch == b.x.batch && a.x.row == b.x.row &&
             a.x.width == b.x.width;
    };
    for (const auto& group : grouped(projections(), same_rows)) {
      const int64_t width = group[0].x.width, parts = group.size();
      const bool wanted = std::any_of(group.begin(), group.end(),
                                      [](const Input& in) { return in.dweight != nullptr; });
      Factors<T> x(wanted ? batch : 0, group[0].part ? shape_.keys : L_, width);
      if (wanted)
        parallel_tasks(batch, [&](int64_t b, int64_t) {
          x.set(b, given(group[0], b), group[0].x.at(b, 0), group[0].x.row);
        });
      Scratch<float> sums(wanted ? d_ * kColumns : 0, at::get_num_threads());
      parallel_tasks(shape_.num_heads * parts, [&](int64_t task, int64_t worker) {
        weight(group[task % parts], task / parts, positions[task / parts], x, sums[worker]);
        packed_gemm_done<T>();
      });
    }
    if (g_.out_weight) {
      const ChosenHeads chosen{batch, shape_.num_heads, L_, d_, layer_.active, layer_.first};
      outer_heads_packed<T, T>(chosen, {w_.context, 0, 0, L_ * d_, d_},
                               {grad_output_, L_ * out_, out_, out_}, layer_.head_weight,
                               {g_.out_weight, out_, E_, true}, nullptr);
      for (int64_t h = 0; h < shape_.num_heads; ++h)
        if (positions[h].empty())
          for (int64_t row = 0; row < out_; ++row)
            std::fill_n(g_.out_weight + row * E_ + h * d_, d_, T(0.f));
    }
  }

  /// The gradients of a head's rows of a weight and of its biases.
  void weight(const Input& in, int64_t h, const std::vector<int64_t>& users, const Factors<T>& x,
              float* sums) const {
    const int64_t width = in.x.width;
    auto left = [&](size_t i) -> LeftFactor<T> {
      const int64_t n = users[i], b = layer_.active[n].b;
      const int64_t row_length = in.part ? even(shape_.lengths[b] + shape_.added) : even(L_);
      return {turned_of(in, n), row_length, given(in, b)};
    };
    if (in.dweight) {
      T* const dweight = in.dweight + h * d_ * width;
      add_products<T>(
          users, layer_.active, x, d_, width, left,
          [&](int64_t column) {
            if constexpr (std::is_same_v<T, float>)
              return Panel{dweight + column, width};
            else
              return Panel{sums, kColumns};
          },
          [&](int64_t column, int64_t columns) {
            if constexpr (!std::is_same_v<T, float>)
              convert_rows(d_, columns, sums, kColumns, nullptr, dweight + column, width);
          });
    }
    for (size_t i = 0; i < users.size(); ++i) {
      const auto [turned, row_length, rows] = left(i);
      for (int64_t c = 0; c < d_; ++c) {
        if (in.dbias) add_row_sum(turned + c * row_length, rows, in.dbias + h * d_ + c);
        if (in.row_bias) in.row_bias[h * d_ + c] += float(turned[c * row_length + rows]);
      }
    }
  }

  void out_bias() {
    const int64_t rows = shape_.batch * L_;
    parallel_tasks(blocks(out_, kColumns), [&](int64_t task, int64_t) {
      const int64_t begin = task * kColumns, end = std::min(out_, begin + kColumns);
      add_row_sums(rows, end - begin, grad_output_ + begin, out_, g_.out_bias + begin);
    });
  }

  const Layer<T, float>& layer_;
  const AttentionShape<float>& shape_;
  const LayerWorkspace<const T, const float>& w_;
  const T* grad_output_;
  const LayerGradients<T, float>& g_;
  const UsedHeads used_;
  const int64_t L_, S_, d_, E_, out_, active_, q_size_, kv_size_;
  const Array<T> memory_;
};

}  // namespace

template <typename T>
void layer_backward_packed(const Layer<T, float>& layer,
                           const LayerWorkspace<const T, const float>& workspace,
                           const T* grad_output, const LayerGradients<T, float>& gradients) {
  Backward<T>(layer, workspace, grad_output, gradients).run();
}

#define HEADWISE_INSTANTIATE(T)                                                                 \
  template void layer_backward_packed<T>(const Layer<T, float>&,                                \
                                         const LayerWorkspace<const T, const float>&, const T*, \
                                         const LayerGradients<T, float>&);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

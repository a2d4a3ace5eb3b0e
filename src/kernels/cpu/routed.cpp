#include "kernels/cpu/routed.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/plain_layer.h"

namespace headwise::kernels {
namespace {

template <typename T>
HeadTensors<T> head_tensors(const RoutedLayer<T>& routed, const T* q, const T* k, const T* v,
                            int64_t n) {
  const auto& a = routed.layer.active[n];
  const auto& shape = routed.layer.shape;
  const int64_t d = shape.width, kv = (shape.keys + shape.added) * d;
  return {a.b, a.h, q + routed.begin[n] * d, k + n * kv, v + n * kv, d, d, d};
}

/// Rows [n, width] added to those of `tokens` in y, which begins with the row of token `first`.
template <typename T>
void scatter_add(const T* x, const int64_t* tokens, int64_t n, int64_t first, int64_t width, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    T* const to = y + (tokens[i] - first) * width;
    for (int64_t c = 0; c < width; ++c) to[c] += x[i * width + c];
  }
}

}  // namespace

template <typename T>
void routed_forward(const RoutedLayer<T>& routed, const LayerWorkspace<T>& w, T* output) {
  const auto& layer = routed.layer;
  const auto& shape = layer.shape;
  const int64_t L = shape.queries, d = shape.width, E = shape.num_heads * d;
  const int64_t kv = (shape.keys + shape.added) * d, workers = at::get_num_threads();
  const int64_t active = layer.active.size(), width = layer.out_width;

  const Scratch<T> gathered(kRowBlock * layer.query.width, workers),
      scratch(attention_scratch(shape), workers);
  parallel_tasks(active, [&](int64_t n, int64_t worker) {
    const auto& a = layer.active[n];
    const int64_t length = shape.lengths[a.b], begin = routed.begin[n], count = routed.count(n);
    T *const q = w.q + begin * d, *const k = w.k + n * kv, *const v = w.v + n * kv;
    project(layer, layer.key, a.b, length, layer.k_weight, layer.k_bias, a.h, k);
    append_rows(layer, a, layer.bias_k, k);
    project(layer, layer.value, a.b, length, layer.v_weight, layer.v_bias, a.h, v);
    append_rows(layer, a, layer.bias_v, v);
    const auto own = routed.shape(n);
    for (int64_t row = 0; row < count; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, count - row);
      gather_rows(layer.query, a.b, own.places + row, rows, gathered[worker]);
      const Rows<const T> chosen{gathered[worker], 0, layer.query.width, layer.query.width};
      project(layer, chosen, 0, rows, layer.q_weight, layer.q_bias, a.h, q + row * d);
    }
    const auto head = head_tensors<T>(routed, w.q, w.k, w.v, n);
    for (int64_t row = 0; row < count; row += kQueryBlock)
      attention_forward(own, head, row, std::min(kQueryBlock, count - row),
                        w.context + (begin + row) * d, d, w.lse + begin + row, scratch[worker]);
  });

  const int64_t row_blocks = blocks(L, kRowBlock);
  const Scratch<T> weighted(kRowBlock * d, workers), products(kRowBlock * width, workers);
  parallel_tasks(shape.batch * row_blocks, [&](int64_t task, int64_t worker) {
    const int64_t b = task / row_blocks, row = task % row_blocks * kRowBlock;
    const int64_t rows = std::min(kRowBlock, L - row);
    T* y = output + (b * L + row) * width;
    fill_rows(layer.out_bias, rows, width, y);
    for (int64_t n = layer.first[b]; n < layer.first[b + 1]; ++n) {
      const auto& a = layer.active[n];
      const auto [begin, end] = routed.within(n, row, rows);
      if (begin == end) continue;
      for (int64_t i = begin; i < end; ++i) {
        const T by = layer.head_weight[routed.weight_place(a, routed.tokens[i])];
        for (int64_t c = 0; c < d; ++c)
          weighted[worker][(i - begin) * d + c] = by * w.context[i * d + c];
      }
      gemm<T>(Transpose::no, Transpose::yes, end - begin, width, d, 1, weighted[worker], d,
              layer.out_weight + a.h * d, E, 0, products[worker], width);
      scatter_add(products[worker], routed.tokens.data() + begin, end - begin, row, width, y);
    }
  });
}

template <typename T>
void routed_backward(const RoutedLayer<T>& routed, const LayerWorkspace<const T>& w,
                     const T* grad_output, const LayerGradients<T>& g) {
  const auto& layer = routed.layer;
  const auto& shape = layer.shape;
  const int64_t L = shape.queries, d = shape.width, E = shape.num_heads * d;
  const int64_t S = shape.keys + shape.added, width = layer.out_width;
  const int64_t active = layer.active.size(), chosen = routed.tokens.size();
  const int64_t workers = at::get_num_threads();
  const Rows<const T> grad{grad_output, L * width, width, width};
  // Gradients of the active heads, in their order, as the workspace is laid out.
  const Scratch<T> gradients(chosen * (2 * d + 1) + active * S * 2 * d, 1);
  T *const grad_context = gradients[0], *const dq = grad_context + chosen * d,
           *const dk = dq + chosen * d, *const dv = dk + active * S * d,
           *const delta = dv + active * S * d;
  const int64_t widest = std::max(width, layer.query.width);
  const Scratch<T> scratch(attention_scratch(shape), workers), rows_of(kRowBlock * widest, workers),
      tiles(kRowBlock * std::max(layer.query.width, d), workers);
  const int64_t* const tokens = routed.tokens.data();

  const auto head_gradient = [&](int64_t n, int64_t copy, int64_t worker) {
    const auto& a = layer.active[n];
    const int64_t begin = routed.begin[n], end = routed.begin[n + 1];
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, end - row);
      gather_rows(grad, a.b, tokens + row, rows, rows_of[worker]);
      gemm<T>(Transpose::no, Transpose::no, rows, d, width, 1, rows_of[worker], width,
              layer.out_weight + a.h * d, E, 0, grad_context + row * d, d);
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t place = routed.weight_place(a, tokens[i]);
      const T weight = layer.head_weight[place];
      T sum = 0;
      for (int64_t c = i * d; c < (i + 1) * d; ++c) {
        sum += grad_context[c] * w.context[c];
        grad_context[c] *= weight;
      }
      delta[i] = weight * sum;
      if (g.head_weight) g.head_weight[place] = sum;
    }
    attention_backward(routed.shape(n), head_tensors<T>(routed, w.q, w.k, w.v, n),
                       grad_context + begin * d, d, delta + begin, w.lse + begin, dq + begin * d, d,
                       dk + n * S * d, d, dv + n * S * d, d, g.mask, g.mask.of(copy, a.b, a.h),
                       scratch[worker]);
  };
  const auto lists = by_mask_part(layer.active, shape, g.mask);
  parallel_tasks(lists.size(), [&](int64_t list, int64_t worker) {
    for (const int64_t n : lists[list]) head_gradient(n, g.mask.copies > 1 ? list : 0, worker);
  });

  // Inputs: the sum over a sequence's heads, each block of rows by one worker.
  const int64_t row_blocks = blocks(std::max(L, shape.keys), kRowBlock);
  parallel_tasks(shape.batch * row_blocks, [&](int64_t task, int64_t worker) {
    const int64_t b = task / row_blocks, row = task % row_blocks * kRowBlock;
    const int64_t length = shape.lengths[b];
    for (int64_t n = layer.first[b]; n < layer.first[b + 1]; ++n) {
      const int64_t h = layer.active[n].h;
      if (g.query && row < L) {
        const int64_t D = layer.query.width;
        const auto [begin, end] = routed.within(n, row, std::min(kRowBlock, L - row));
        if (begin < end) {
          gemm<T>(Transpose::no, Transpose::no, end - begin, D, d, 1, dq + begin * d, d,
                  layer.q_weight + h * d * D, D, 0, tiles[worker], D);
          scatter_add(tiles[worker], tokens + begin, end - begin, 0, D, g.query + b * L * D);
        }
      }
      const auto add = [&](const Rows<const T>& x, const T* of, const T* weight, T* dx) {
        if (dx && row < length)
          gemm<T>(Transpose::no, Transpose::no, std::min(kRowBlock, length - row), x.width, d, 1,
                  of + (n * S + row) * d, d, weight + h * d * x.width, x.width, 1,
                  dx + (b * shape.keys + row) * x.width, x.width);
      };
      add(layer.key, dk, layer.k_weight, g.key);
      add(layer.value, dv, layer.v_weight, g.value);
    }
  });

  // Weights: the sum over the sequences in which the head ran, by one worker per head and matrix.
  const auto positions = by_head(layer.active, shape.num_heads);
  parallel_tasks(shape.num_heads * 4, [&](int64_t task, int64_t worker) {
    const int64_t h = task / 4, part = task % 4;
    for (const int64_t n : positions[h]) {
      const auto& a = layer.active[n];
      if (part == 1)
        add_key_gradient(layer, a, dk + n * S * d, layer.key, g.k_weight, g.k_bias, g.bias_k);
      if (part == 2)
        add_key_gradient(layer, a, dv + n * S * d, layer.value, g.v_weight, g.v_bias, g.bias_v);
      if (part == 1 || part == 2) continue;
      const int64_t end = routed.begin[n + 1];
      for (int64_t row = routed.begin[n]; row < end; row += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, end - row);
        if (part == 0) {
          const int64_t D = layer.query.width;
          if (g.q_weight) gather_rows(layer.query, a.b, tokens + row, rows, rows_of[worker]);
          add_weight_gradient(dq + row * d, rows, d, h, rows_of[worker], D, D, g.q_weight,
                              g.q_bias);
        } else if (g.out_weight) {
          gather_rows(grad, a.b, tokens + row, rows, rows_of[worker]);
          for (int64_t i = 0; i < rows; ++i) {
            const T by = layer.head_weight[routed.weight_place(a, tokens[row + i])];
            for (int64_t c = 0; c < d; ++c)
              tiles[worker][i * d + c] = by * w.context[(row + i) * d + c];
          }
          gemm<T>(Transpose::yes, Transpose::no, width, d, rows, 1, rows_of[worker], width,
                  tiles[worker], d, 1, g.out_weight + h * d, E);
        }
      }
    }
  });
  if (g.out_bias) add_column_sums(grad_output, shape.batch * L, width, g.out_bias);
}

#define HEADWISE_INSTANTIATE(T)                                                           \
  template void routed_forward<T>(const RoutedLayer<T>&, const LayerWorkspace<T>&, T*);   \
  template void routed_backward<T>(const RoutedLayer<T>&, const LayerWorkspace<const T>&, \
                                   const T*, const LayerGradients<T>&);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(double)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

#include "kernels/cpu/layer.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/plain_layer.h"

namespace headwise::kernels {
namespace {

template <typename T>
HeadTensors<T> head_tensors(const Layer<T>& layer, const T* q, const T* k, const T* v,
                            const ActiveHead& a) {
  const int64_t d = layer.shape.width, L = layer.shape.queries;
  const int64_t kv = (layer.shape.keys + layer.shape.added) * d;
  return {a.b, a.h, q + a.slot * L * d, k + a.slot * kv, v + a.slot * kv, d, d, d};
}

}  // namespace

template <typename T>
void layer_forward(const Layer<T>& layer, const LayerWorkspace<T>& w, T* output) {
  const auto& shape = layer.shape;
  const int64_t L = shape.queries, d = shape.width, E = shape.num_heads * d;
  const int64_t kv = (shape.keys + shape.added) * d;
  const int64_t active = layer.active.size();

  parallel_tasks(active * 3, [&](int64_t task, int64_t) {
    const auto& a = layer.active[task / 3];
    const int64_t length = shape.lengths[a.b];
    if (task % 3 == 0) {
      project(layer, layer.query, a.b, L, layer.q_weight, layer.q_bias, a.h, w.q + a.slot * L * d);
    } else if (task % 3 == 1) {
      project(layer, layer.key, a.b, length, layer.k_weight, layer.k_bias, a.h, w.k + a.slot * kv);
      append_rows(layer, a, layer.bias_k, w.k + a.slot * kv);
    } else {
      project(layer, layer.value, a.b, length, layer.v_weight, layer.v_bias, a.h,
              w.v + a.slot * kv);
      append_rows(layer, a, layer.bias_v, w.v + a.slot * kv);
    }
  });

  const int64_t query_blocks = blocks(L, kQueryBlock);
  const int64_t scratch_size = attention_scratch(shape);
  const Scratch<T> scratch(scratch_size, at::get_num_threads());
  parallel_tasks(active * query_blocks, [&](int64_t task, int64_t worker) {
    const auto& a = layer.active[task / query_blocks];
    const int64_t row = task % query_blocks * kQueryBlock;
    attention_forward(shape, head_tensors<T>(layer, w.q, w.k, w.v, a), row,
                      std::min(kQueryBlock, L - row), w.context + (a.slot * L + row) * d, d,
                      w.lse + a.slot * L + row, scratch[worker]);
  });

  const int64_t row_blocks = blocks(L, kRowBlock);
  parallel_tasks(shape.batch * row_blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / row_blocks, row = task % row_blocks * kRowBlock;
    const int64_t rows = std::min(kRowBlock, L - row), width = layer.out_width;
    T* y = output + (b * L + row) * width;
    fill_rows(layer.out_bias, rows, width, y);
    for (int64_t n = layer.first[b]; n < layer.first[b + 1]; ++n) {
      const auto& a = layer.active[n];
      gemm<T>(Transpose::no, Transpose::yes, rows, width, d,
              layer.head_weight[b * shape.num_heads + a.h], w.context + (a.slot * L + row) * d, d,
              layer.out_weight + a.h * d, E, 1, y, width);
    }
  });
}

template <typename T>
void layer_backward(const Layer<T>& layer, const LayerWorkspace<const T>& w, const T* grad_output,
                    const LayerGradients<T>& g) {
  const auto& shape = layer.shape;
  const int64_t L = shape.queries, d = shape.width, E = shape.num_heads * d;
  const int64_t S = shape.keys + shape.added, width = layer.out_width;
  const int64_t active = layer.active.size();
  // Gradients of the chosen heads, one after the other in the order of `active`.
  const Scratch<T> gradients(active * (L * (2 * d + 1) + S * 2 * d), 1);
  T *const grad_context = gradients[0], *const dq = grad_context + active * L * d,
           *const dk = dq + active * L * d, *const dv = dk + active * S * d,
           *const delta = dv + active * S * d;
  const int64_t scratch_size = attention_scratch(shape);
  const Scratch<T> scratch(scratch_size, at::get_num_threads());

  const auto head_gradient = [&](int64_t n, int64_t copy, int64_t worker) {
    const auto& a = layer.active[n];
    const T weight = layer.head_weight[a.b * shape.num_heads + a.h];
    T* gc = grad_context + n * L * d;
    const T* context = w.context + a.slot * L * d;
    gemm<T>(Transpose::no, Transpose::no, L, d, width, 1, grad_output + a.b * L * width, width,
            layer.out_weight + a.h * d, E, 0, gc, d);
    T total = 0;
    for (int64_t i = 0; i < L; ++i) {
      T sum = 0;
      for (int64_t c = 0; c < d; ++c) sum += gc[i * d + c] * context[i * d + c];
      for (int64_t c = 0; c < d; ++c) gc[i * d + c] *= weight;
      delta[n * L + i] = weight * sum;
      total += sum;
    }
    if (g.head_weight) g.head_weight[a.b * shape.num_heads + a.h] = total;
    const auto head = head_tensors<T>(layer, w.q, w.k, w.v, a);
    if (layer.round) {  // `context` was stored in fewer bits
      attention_row_sums(shape, head, gc, d, w.lse + a.slot * L, delta + n * L, scratch[worker]);
    }
    attention_backward(shape, head, gc, d, delta + n * L, w.lse + a.slot * L, dq + n * L * d, d,
                       dk + n * S * d, d, dv + n * S * d, d, g.mask, g.mask.of(copy, a.b, a.h),
                       scratch[worker]);
  };
  const auto lists = by_mask_part(layer.active, shape, g.mask);
  parallel_tasks(lists.size(), [&](int64_t list, int64_t worker) {
    for (const int64_t n : lists[list]) head_gradient(n, g.mask.copies > 1 ? list : 0, worker);
  });

  // Inputs: the sum over a sequence's heads, each block of rows by one worker.
  const int64_t row_blocks = blocks(std::max(L, shape.keys), kRowBlock);
  parallel_tasks(shape.batch * row_blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / row_blocks, row = task % row_blocks * kRowBlock;
    const int64_t length = shape.lengths[b];
    for (int64_t n = layer.first[b]; n < layer.first[b + 1]; ++n) {
      const int64_t h = layer.active[n].h;
      auto add = [&](const Rows<const T>& x, int64_t rows, int64_t sequence_rows, const T* grad,
                     const T* weight, T* dx) {
        if (dx && row < rows)
          gemm<T>(Transpose::no, Transpose::no, std::min(kRowBlock, rows - row), x.width, d, 1,
                  grad + row * d, d, weight + h * d * x.width, x.width, 1,
                  dx + (b * sequence_rows + row) * x.width, x.width);
      };
      add(layer.query, L, L, dq + n * L * d, layer.q_weight, g.query);
      add(layer.key, length, shape.keys, dk + n * S * d, layer.k_weight, g.key);
      add(layer.value, length, shape.keys, dv + n * S * d, layer.v_weight, g.value);
    }
  });

  // Weights: the sum over the sequences that chose the head, by one worker per head and matrix.
  const auto positions = by_head(layer.active, shape.num_heads);
  parallel_tasks(shape.num_heads * 4, [&](int64_t task, int64_t) {
    const int64_t h = task / 4;
    for (const int64_t n : positions[h]) {
      const auto& a = layer.active[n];
      if (task % 4 == 0) {
        const auto& x = layer.query;
        add_weight_gradient(dq + n * L * d, L, d, h, x.at(a.b, 0), x.row, x.width, g.q_weight,
                            g.q_bias);
      } else if (task % 4 == 1) {
        add_key_gradient(layer, a, dk + n * S * d, layer.key, g.k_weight, g.k_bias, g.bias_k);
      } else if (task % 4 == 2) {
        add_key_gradient(layer, a, dv + n * S * d, layer.value, g.v_weight, g.v_bias, g.bias_v);
      } else if (g.out_weight) {
        gemm<T>(Transpose::yes, Transpose::no, width, d, L,
                layer.head_weight[a.b * shape.num_heads + h], grad_output + a.b * L * width, width,
                w.context + a.slot * L * d, d, 1, g.out_weight + h * d, E);
      }
    }
  });
  if (g.out_bias) add_column_sums(grad_output, shape.batch * L, width, g.out_bias);
}

#define HEADWISE_INSTANTIATE(T)                                                              \
  template void layer_forward<T>(const Layer<T>&, const LayerWorkspace<T>&, T*);             \
  template void layer_backward<T>(const Layer<T>&, const LayerWorkspace<const T>&, const T*, \
                                  const LayerGradients<T>&);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(double)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

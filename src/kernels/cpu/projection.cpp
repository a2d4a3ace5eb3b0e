#include "kernels/cpu/projection.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"

namespace headwise::kernels {
namespace {

template <typename T>
void fill_rows(const T* bias, int64_t rows, int64_t n, T* y, int64_t ldy) {
  for (int64_t i = 0; i < rows; ++i) {
    if (bias)
      std::copy_n(bias, n, y + i * ldy);
    else
      std::fill_n(y + i * ldy, n, T(0));
  }
}

/// Whether the stored M_h has to be transposed to be a right factor [d, C].
template <typename T>
Transpose as_stored(const HeadWeight<T>& weight) {
  return weight.turned ? Transpose::yes : Transpose::no;
}
template <typename T>
Transpose transposed(const HeadWeight<T>& weight) {
  return weight.turned ? Transpose::no : Transpose::yes;
}

}  // namespace

template <typename T>
void project_heads(const ChosenHeads& chosen, const Rows<const T>& x,
                   const HeadWeight<const T>& weight, const T* bias, const HeadRows<T>& y) {
  const int64_t L = chosen.rows, d = chosen.width, row_blocks = blocks(L, kRowBlock);
  parallel_tasks(chosen.active.size() * row_blocks, [&](int64_t task, int64_t) {
    const auto& a = chosen.active[task / row_blocks];
    const int64_t row = task % row_blocks * kRowBlock, rows = std::min(kRowBlock, L - row);
    fill_rows(bias ? bias + a.h * d : nullptr, rows, d, y.at(a, row), y.row);
    gemm<T>(Transpose::no, transposed(weight), rows, d, weight.columns, 1, x.at(a.b, row), x.row,
            weight.of(a.h, d), weight.ld, 1, y.at(a, row), y.row);
  });
}

template <typename T>
void combine_heads(const ChosenHeads& chosen, const HeadRows<const T>& x,
                   const HeadWeight<const T>& weight, const T* bias, const T* factor, T* y) {
  const int64_t L = chosen.rows, d = chosen.width, width = weight.columns;
  const int64_t row_blocks = blocks(L, kRowBlock);
  parallel_tasks(chosen.batch * row_blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / row_blocks, row = task % row_blocks * kRowBlock;
    const int64_t rows = std::min(kRowBlock, L - row);
    T* const to = y + (b * L + row) * width;
    fill_rows(bias, rows, width, to, width);
    for (int64_t n = chosen.first[b]; n < chosen.first[b + 1]; ++n) {
      const auto& a = chosen.active[n];
      gemm<T>(Transpose::no, as_stored(weight), rows, width, d,
              factor ? factor[b * chosen.num_heads + a.h] : T(1), x.at(a, row), x.row,
              weight.of(a.h, d), weight.ld, 1, to, width);
    }
  });
}

template <typename T>
void outer_heads(const ChosenHeads& chosen, const HeadRows<const T>& y, const Rows<const T>& x,
                 const T* factor, const HeadWeight<T>& weight, T* sums) {
  const int64_t L = chosen.rows, d = chosen.width, width = weight.columns;
  const auto positions = by_head(chosen.active, chosen.num_heads);
  parallel_tasks(chosen.num_heads, [&](int64_t h, int64_t) {
    for (const int64_t n : positions[h]) {
      const auto& a = chosen.active[n];
      const T* const rows = y.at(a, 0);
      const T scale = factor ? factor[a.b * chosen.num_heads + h] : T(1);
      if (weight.data && weight.turned)
        gemm<T>(Transpose::yes, Transpose::no, width, d, L, scale, x.at(a.b, 0), x.row, rows, y.row,
                1, weight.of(h, d), weight.ld);
      else if (weight.data)
        gemm<T>(Transpose::yes, Transpose::no, d, width, L, scale, rows, y.row, x.at(a.b, 0), x.row,
                1, weight.of(h, d), weight.ld);
      if (sums)
        for (int64_t i = 0; i < L; ++i)
          for (int64_t c = 0; c < d; ++c) sums[h * d + c] += rows[i * y.row + c];
    }
  });
}

template <typename T, typename Acc>
void weigh_gradient(const ChosenHeads& chosen, const HeadRows<const T>& heads, const Acc* factor,
                    const HeadRows<T>& grad, Acc* grad_factor) {
  const int64_t d = chosen.width;
  parallel_tasks(chosen.active.size(), [&](int64_t n, int64_t) {
    const auto& a = chosen.active[n];
    const int64_t place = a.b * chosen.num_heads + a.h;
    Acc total = 0;
    for (int64_t i = 0; i < chosen.rows; ++i) {
      const T* const from = heads.at(a, i);
      T* const to = grad.at(a, i);
      if constexpr (std::is_same_v<T, double>) {
        for (int64_t c = 0; c < d; ++c) {
          total += to[c] * from[c];
          to[c] *= factor[place];
        }
      } else {
        float dot = 0;
        if (grad_factor) thin_gemm(1, 1, {d}, &from, to, d, &dot, 1);
        total += dot;
        scale(to, d, factor[place], to);
      }
    }
    if (grad_factor) grad_factor[place] = total;
  });
}
template void weigh_gradient<double, double>(const ChosenHeads&, const HeadRows<const double>&,
                                             const double*, const HeadRows<double>&, double*);
template void weigh_gradient<float, float>(const ChosenHeads&, const HeadRows<const float>&,
                                           const float*, const HeadRows<float>&, float*);
template void weigh_gradient<c10::BFloat16, float>(const ChosenHeads&,
                                                   const HeadRows<const c10::BFloat16>&,
                                                   const float*, const HeadRows<c10::BFloat16>&,
                                                   float*);

#define HEADWISE_INSTANTIATE(T)                                                                    \
  template void project_heads<T>(const ChosenHeads&, const Rows<const T>&,                         \
                                 const HeadWeight<const T>&, const T*, const HeadRows<T>&);        \
  template void combine_heads<T>(const ChosenHeads&, const HeadRows<const T>&,                     \
                                 const HeadWeight<const T>&, const T*, const T*, T*);              \
  template void outer_heads<T>(const ChosenHeads&, const HeadRows<const T>&, const Rows<const T>&, \
                               const T*, const HeadWeight<T>&, T*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(double)
#undef HEADWISE_INSTANTIATE

}  // namespace headwise::kernels

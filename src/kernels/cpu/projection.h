// The products around attention, over the heads that were chosen: project, combine and outer, of
// which both projections of a layer consist, forward and backward. Raw pointers; heads that were
// not chosen are never touched.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/layer.h"

namespace headwise::kernels {

/// Which heads of which sequences, and their sizes.
struct ChosenHeads {
  int64_t batch = 0, num_heads = 0;
  int64_t rows = 0;                       ///< L
  int64_t width = 0;                      ///< d
  const std::vector<ActiveHead>& active;  ///< by sequence
  const std::vector<int64_t>& first;      ///< [B + 1] where each sequence begins in `active`
};

/// The rows of the chosen heads by strides, columns next to each other: of [B, H, L, d], or of a
/// workspace [slots, L, d].
template <typename T>
struct HeadRows {
  T* data = nullptr;
  int64_t batch = 0, head = 0, slot = 0, row = 0;
  T* at(const ActiveHead& a, int64_t i) const {
    return data + a.b * batch + a.h * head + a.slot * slot + i * row;
  }
};

/// The rows of a weight that belong to head h, M_h [d, C]: rows h * d and following of [H d, C],
/// or, if the weight is stored transposed (`turned`), columns of [C, H d].
template <typename T>
struct HeadWeight {
  T* data = nullptr;
  int64_t columns = 0;  ///< C
  int64_t ld = 0;       ///< distance of stored rows
  bool turned = false;
  T* of(int64_t h, int64_t width) const { return data + h * width * (turned ? 1 : ld); }
};

/// y[b, h] [L, d] = x[b] [L, C] M_h' + bias[h d .. + d] for every chosen head.
template <typename T>
void project_heads(const ChosenHeads& chosen, const Rows<const T>& x,
                   const HeadWeight<const T>& weight, const T* bias, const HeadRows<T>& y);

/// y[b] [L, C] = bias [C] + sum over the chosen heads of factor[b, h] x[b, h] [L, d] M_h. `factor`
/// [B, H] may be null: 1. y is contiguous.
template <typename T>
void combine_heads(const ChosenHeads& chosen, const HeadRows<const T>& x,
                   const HeadWeight<const T>& weight, const T* bias, const T* factor, T* y);

/// weight_h [d, C] += sum over the sequences that chose h of factor[b, h] y[b, h]' x[b]: the
/// gradient of a weight, by one worker per head in a fixed order; null: not wanted. sums [H d], if
/// wanted, accumulates the rows of y: the gradient of a bias.
template <typename T>
void outer_heads(const ChosenHeads& chosen, const HeadRows<const T>& y, const Rows<const T>& x,
                 const T* factor, const HeadWeight<T>& weight, T* sums);

/// The gradient of combine's heads from that of factor * heads, in place: grad[b, h] *= factor, and
/// grad_factor[b, h], if wanted, = the sum of grad * heads before that.
template <typename T, typename Acc>
void weigh_gradient(const ChosenHeads& chosen, const HeadRows<const T>& heads, const Acc* factor,
                    const HeadRows<T>& grad, Acc* grad_factor);

/// Whether the packed forms, for float and bfloat16, serve heads of these sizes: brgemm runs here
/// and the widths suit it. Their sums are float; they are the fast path.
template <typename T>
bool packed_projection_supported(int64_t width, int64_t columns);
template <typename T>
void project_heads_packed(const ChosenHeads& chosen, const Rows<const T>& x,
                          const HeadWeight<const T>& weight, const float* bias,
                          const HeadRows<T>& y);
template <typename T>
void combine_heads_packed(const ChosenHeads& chosen, const HeadRows<const T>& x,
                          const HeadWeight<const T>& weight, const float* bias, const float* factor,
                          T* y);
/// Of W, float or T, the used heads' parts are written, and the others are left alone.
template <typename T, typename W>
void outer_heads_packed(const ChosenHeads& chosen, const HeadRows<const T>& y,
                        const Rows<const T>& x, const float* factor, const HeadWeight<W>& weight,
                        float* sums);

/// Few rows, as in decoding, over an unpacked weight; mainly for float16, which the packed forms do
/// not support. B L <= kThinRows; the weight of project_heads is not turned, that of combine_heads
/// is.
template <typename T, typename W>
void project_heads_thin(const ChosenHeads& chosen, const Rows<const T>& x,
                        const HeadWeight<const W>& weight, const float* bias, const HeadRows<T>& y);
template <typename T, typename W>
void combine_heads_thin(const ChosenHeads& chosen, const HeadRows<const T>& x,
                        const HeadWeight<const W>& weight, const float* bias, const float* factor,
                        T* y);

}  // namespace headwise::kernels

// The projections of a layer, head by head: for each head, one matrix product over the sequences
// that chose it. Heads' rows lie packed, [N, R, d] in the order of the work list.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "ops/aten/work_list.h"
#include "ops/projection.h"

namespace headwise::ops::aten {

/// A head that at least one sequence chose.
struct Head {
  int64_t h, begin, count, d;
  /// Its rows of a weight [E, D] or bias [E].
  at::Tensor slice(const at::Tensor& t) const { return t.narrow(0, h * d, d); }
  OptionalTensor slice(const OptionalTensor& t) const {
    return t ? OptionalTensor(slice(*t)) : OptionalTensor();
  }
  /// Its pairs of a packed tensor [N, ., .].
  at::Tensor pairs(const at::Tensor& t) const { return t.narrow(0, begin, count); }
};
std::vector<Head> chosen(const WorkList& list, int64_t num_heads, int64_t d);

/// Rows of the sequences that chose head h: x [B, R, D] -> [n, R, D].
at::Tensor rows_of(const at::Tensor& x, const WorkList& list, int64_t h);

/// weight [B, H] of every pair, [N, 1, 1].
at::Tensor pair_weight(const at::Tensor& weight, const WorkList& list, at::ScalarType type);

/// packed [N, R, d] of one head = rows [n, R, D] by its rows of weight [E, D], and bias [E].
void project(const Head& head, const at::Tensor& rows, const at::Tensor& weight,
             const OptionalTensor& bias, const at::Tensor& packed);

/// Gradients of project, of x, weight and bias if needed, from packed gradients [N, R.., d].
struct ProjectGradients {
  at::Tensor x, weight, bias;
};
ProjectGradients project_backward(const WorkList& list, const std::vector<Head>& heads,
                                  const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& grad, std::array<bool, 3> needs);

/// bias [Dout] + sum over heads of packed [N, L, d] by their columns of weight [Dout, E], in the
/// accumulation type: a head's share is rounded once, the sum is not. -> [B, L, Dout]
at::Tensor combine(const WorkList& list, const std::vector<Head>& heads, const at::Tensor& packed,
                   const at::Tensor& weight, const OptionalTensor& bias, int64_t batch);

/// Gradients of combine: of `packed` [N, L, d], and of the weight if needed; `scaled` is what
/// was combined.
struct CombineGradients {
  at::Tensor packed, weight;
};
CombineGradients combine_backward(const WorkList& list, const std::vector<Head>& heads,
                                  const at::Tensor& grad_output, const at::Tensor& scaled,
                                  const at::Tensor& weight, bool needs_weight);

/// A gradient in the dtype of its input, or without elements where it was not needed.
at::Tensor result(const at::Tensor& gradient, const at::Tensor& like);

at::Tensor forward(const ProjectionInputs& in);
at::Tensor forward(const OutputInputs& in);
ProjectionBackward backward(const at::Tensor& grad_output, const ProjectionInputs& in,
                            const Needs<3>& needs);
OutputBackward backward(const at::Tensor& grad_output, const OutputInputs& in,
                        const Needs<4>& needs);

}  // namespace headwise::ops::aten

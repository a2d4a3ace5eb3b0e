#include "headwise/cofi.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "ops/gates/hard_concrete.h"

namespace headwise {
namespace {

/// Factor on the logits of masks in evaluation, from Wang et al. 2020 (arXiv 1910.04732).
constexpr double kSharpness = 0.8;

}  // namespace

at::Tensor structure_size(at::TensorList heads, const at::Tensor& attention, at::TensorList neurons,
                          const at::Tensor& ffn, const at::Tensor& hidden,
                          at::IntArrayRef head_dims) {
  TORCH_CHECK_VALUE(
      heads.size() == head_dims.size() && attention.numel() == static_cast<int64_t>(heads.size()),
      "heads, attention and head_dims must have the same length, got ", heads.size(), ", ",
      attention.numel(), " and ", head_dims.size());
  TORCH_CHECK_VALUE(ffn.numel() == static_cast<int64_t>(neurons.size()),
                    "neurons and ffn must have the same length, got ", neurons.size(), " and ",
                    ffn.numel());
  at::Tensor rows = at::zeros({}, hidden.options());  // weights for each hidden dimension
  for (size_t i = 0; i < heads.size(); ++i) {
    const double each = 4.0 * static_cast<double>(head_dims[i]);
    rows = rows + attention.select(0, static_cast<int64_t>(i)) * heads[i].sum() * each;
  }
  for (size_t i = 0; i < neurons.size(); ++i) {
    rows = rows + ffn.select(0, static_cast<int64_t>(i)) * neurons[i].sum() * 2.0;
  }
  return rows * hidden.sum();
}

at::Tensor sparsity_penalty(const at::Tensor& size, double full_size, const at::Tensor& progress,
                            double target, double warmup, const at::Tensor& multipliers) {
  TORCH_CHECK_VALUE(full_size > 0, "full_size must be positive, got ", full_size);
  const at::Tensor share =
      warmup > 0 ? (progress.detach() / warmup).clamp(0.0, 1.0) : at::ones_like(progress.detach());
  const at::Tensor off = 1.0 - size / full_size - (share * target).to(size.scalar_type());
  return lagrangian(off, multipliers);
}

at::Tensor hard_concrete_keep(const at::Tensor& log_alpha, double beta, double gamma, double zeta,
                              double shift) {
  TORCH_CHECK_VALUE(log_alpha.dim() >= 1, "log_alpha must have at least one dimension, got none");
  TORCH_CHECK_VALUE(beta > 0, "beta must be positive, got ", beta);
  const int64_t units = log_alpha.size(-1);
  const at::Tensor values = (log_alpha * (kSharpness / beta)).sigmoid();  // [..., N]
  const at::Tensor open =
      hard_concrete_open((log_alpha.detach() + shift).to(at::kDouble), beta, gamma, zeta);
  const at::Tensor kept = units - (units - open.sum(-1, true)).round();  // [..., 1], half to even
  // Ranks from 0. The sort is stable, so that of equal logits the lower units are kept.
  const at::Tensor rank = log_alpha.detach()
                              .argsort(/*stable=*/true, /*dim=*/-1, /*descending=*/true)
                              .argsort(int64_t{-1}, false);
  return values.masked_fill(rank.ge(kept), 0.0);
}

at::Tensor match_layers(const at::Tensor& distances, const at::Tensor& alive) {
  TORCH_CHECK_VALUE(distances.dim() == 2 && alive.dim() == 1 && alive.size(0) == distances.size(1),
                    "distances must have shape [T, S] and alive [S], got ", distances.sizes(),
                    " and ", alive.sizes());
  const at::Tensor host = distances.detach().to(at::kCPU, at::kDouble).contiguous();
  const at::Tensor living = alive.to(at::kCPU, at::kBool).contiguous();
  const int64_t teachers = host.size(0), students = host.size(1);
  const double* d = host.const_data_ptr<double>();
  const bool* lives = living.const_data_ptr<bool>();
  at::Tensor matched = at::full({teachers}, -1, at::kLong);
  auto* out = matched.mutable_data_ptr<int64_t>();
  int64_t highest = students - 1;  // that may still be taken
  for (int64_t t = teachers - 1; t >= 0; --t) {
    int64_t best = -1;
    for (int64_t s = 0; s <= highest; ++s) {
      if (lives[s] && (best < 0 || d[t * students + s] < d[t * students + best])) best = s;
    }
    out[t] = best;
    if (best >= 0) highest = best;
  }
  return matched.to(distances.device());
}

at::Tensor distillation_loss(const at::Tensor& student, const at::Tensor& teacher,
                             double temperature) {
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be positive, got ", temperature);
  TORCH_CHECK_VALUE(student.sizes() == teacher.sizes() && student.dim() == 2,
                    "student and teacher must have the same shape [B, C], got ", student.sizes(),
                    " and ", teacher.sizes());
  const at::Tensor own = at::log_softmax(student / temperature, -1);
  const at::Tensor other = at::log_softmax(teacher.detach() / temperature, -1);
  return (other.exp() * (other - own)).sum(-1).mean() * (temperature * temperature);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("structure_size", structure_size);
  m.impl("sparsity_penalty", sparsity_penalty);
  m.impl("hard_concrete_keep", hard_concrete_keep);
  m.impl("match_layers", match_layers);
  m.impl("distillation_loss", distillation_loss);
}

}  // namespace headwise

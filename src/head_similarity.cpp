#include <ATen/ATen.h>
#include <torch/library.h>

#include <Eigen/Core>
#include <vector>

#include "headwise/head_similarity.h"

namespace headwise {

at::Tensor linear_cka(at::TensorList outputs) {
  TORCH_CHECK_VALUE(!outputs.empty(), "outputs must be of at least one head, got none");
  using Matrix = Eigen::MatrixXd;
  const int64_t count = static_cast<int64_t>(outputs.size());
  std::vector<Matrix> centred;  // [n, d] each
  std::vector<double> norms;    // of X'X
  for (const at::Tensor& output : outputs) {
    TORCH_CHECK_VALUE(output.dim() == 2 && output.size(0) >= 2,
                      "outputs must be [n, d] of at least 2 rows, got ", output.sizes());
    TORCH_CHECK_VALUE(output.size(0) == outputs[0].size(0), "outputs must have the same rows, got ",
                      outputs[0].size(0), " and ", output.size(0));
    const at::Tensor host = output.detach().to(at::kCPU, at::kDouble).contiguous();
    TORCH_CHECK_VALUE(at::isfinite(host).all().item<bool>(),
                      "outputs must be finite, got NaN or infinity");
    using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    Matrix x =
        Eigen::Map<const RowMajor>(host.const_data_ptr<double>(), host.size(0), host.size(1));
    const double scale = x.norm();
    x.rowwise() -= x.colwise().mean().eval();
    // Centring a constant leaves rounding errors, not a representation.
    const bool constant = x.norm() <= 1e-12 * scale;
    norms.push_back(constant ? 0.0 : (x.transpose() * x).norm());
    centred.push_back(std::move(x));
  }
  at::Tensor cka = at::eye(count, at::TensorOptions(at::kDouble));
  auto value = cka.accessor<double, 2>();
  for (int64_t a = 0; a < count; ++a) {
    for (int64_t b = a + 1; b < count; ++b) {
      if (norms[a] == 0 || norms[b] == 0) continue;
      const double shared = (centred[a].transpose() * centred[b]).squaredNorm();
      value[a][b] = value[b][a] = std::min(1.0, shared / (norms[a] * norms[b]));
    }
  }
  return cka;
}

std::tuple<at::Tensor, at::Tensor> second_order_effect(const at::Tensor& full,
                                                       const at::Tensor& first,
                                                       const at::Tensor& second,
                                                       const at::Tensor& both) {
  TORCH_CHECK_VALUE(full.dim() == 1 && full.size(0) > 0,
                    "full must be [N] of at least one example, got ", full.sizes());
  TORCH_CHECK_VALUE(first.dim() == 2 && first.size(1) == full.size(0),
                    "first must be [P, N] with the N of full, ", full.size(0), ", got ",
                    first.sizes());
  for (const auto* other : {&second, &both}) {
    TORCH_CHECK_VALUE(other->sizes() == first.sizes(),
                      "second and both must have the shape of first, ", first.sizes(), ", got ",
                      other->sizes());
  }
  const at::Tensor effect = both - first - second + full;  // [P, N]
  const int64_t examples = full.size(0);
  const at::Tensor mean = effect.mean(1);
  if (examples == 1) return {mean, at::zeros_like(mean)};
  return {mean, effect.std(1, true) / std::sqrt(static_cast<double>(examples))};
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("linear_cka", linear_cka); }

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("second_order_effect", second_order_effect);
}

}  // namespace headwise

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <Eigen/Cholesky>

#include "headwise/kwon.h"

namespace headwise {

ScaleSolver::ScaleSolver(const at::Tensor& weight, int64_t group)
    : weight_(weight.detach()), group_(group) {
  TORCH_CHECK_VALUE(group > 0 && weight.dim() == 2 && weight.size(1) % group == 0,
                    "weight must have shape [D, units * ", group, "], got ", weight.sizes());
  const auto options = weight_.options().dtype(at::kDouble);
  gram_ = at::zeros({weight.size(1), weight.size(1)}, options);
  cross_ = at::zeros({weight.size(1)}, options);
}

void ScaleSolver::add(const at::Tensor& inputs, const at::Tensor& residual) {
  TORCH_CHECK_VALUE(inputs.dim() == 2 && inputs.size(1) == weight_.size(1),
                    "inputs must have shape [", "T, ", weight_.size(1), "], got ", inputs.sizes());
  TORCH_CHECK_VALUE(residual.dim() == 2 && residual.size(0) == inputs.size(0) &&
                        residual.size(1) == weight_.size(0),
                    "residual must have shape [", inputs.size(0), ", ", weight_.size(0), "], got ",
                    residual.sizes());
  const c10::NoGradGuard no_grad;
  const auto type = at::promote_types(inputs.scalar_type(), at::kFloat);
  const at::Tensor x = inputs.to(type), r = residual.to(type);
  gram_ += at::mm(x.t(), x);                           // [E, E]
  cross_ += (x * at::mm(r, weight_.to(type))).sum(0);  // [E]
}

std::optional<std::vector<double>> ScaleSolver::solve(double damp) const {
  TORCH_CHECK_VALUE(damp >= 0, "damp must not be negative, got ", damp);
  const c10::NoGradGuard no_grad;
  const int64_t units = weight_.size(1) / group_;
  const at::Tensor weight = weight_.to(at::kDouble);
  // <x_u W_u, x_v W_v> summed over tokens: sum over the columns of u and v of (X^T X) * (W^T W)
  const at::Tensor normal = (gram_ * at::mm(weight.t(), weight))
                                .view({units, group_, units, group_})
                                .sum({1, 3})
                                .to(at::kCPU)
                                .contiguous();                                             // [U, U]
  const at::Tensor right = cross_.view({units, group_}).sum(1).to(at::kCPU).contiguous();  // [U]
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Matrix a = Eigen::Map<const Matrix>(normal.const_data_ptr<double>(), units, units);
  a.diagonal().array() += damp;
  const Eigen::Map<const Eigen::VectorXd> b(right.const_data_ptr<double>(), units);
  const Eigen::LDLT<Matrix> solver(a);
  if (solver.info() != Eigen::Success || !(solver.vectorD().array() > 0).all()) return std::nullopt;
  const Eigen::VectorXd change = solver.solve(b);
  if (!change.allFinite()) return std::nullopt;
  std::vector<double> scale(units);
  for (int64_t i = 0; i < units; ++i) scale[i] = 1.0 + change[i];
  return scale;
}

}  // namespace headwise

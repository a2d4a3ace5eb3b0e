#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <Eigen/Cholesky>
#include <algorithm>
#include <utility>

#include "headwise/kwon.h"

namespace headwise {

struct ScaleSolver::Equations {
  Eigen::MatrixXd normal;  // [U, U]: <x_u W_u, x_v W_v>, summed over tokens
  Eigen::VectorXd right;   // [U]: <x_u W_u, residual>
  Eigen::VectorXd ones;    // [U]: <x_u W_u, 1>
};

ScaleSolver::ScaleSolver(const at::Tensor& weight, int64_t group)
    : weight_(weight.detach()), group_(group) {
  TORCH_CHECK_VALUE(group > 0 && weight.dim() == 2 && weight.size(1) % group == 0,
                    "weight must have shape [D, units * ", group, "], got ", weight.sizes());
  const auto options = weight_.options().dtype(at::kDouble);
  gram_ = at::zeros({weight.size(1), weight.size(1)}, options);
  cross_ = at::zeros({weight.size(1)}, options);
  sums_ = at::zeros({weight.size(1)}, options);
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
  sums_ += x.sum(0);
  residual_ += r.to(at::kDouble).square().sum().item<double>();
  residual_sum_ += r.sum(at::kDouble).item<double>();
  entries_ += r.numel();
  equations_.reset();
}

int64_t ScaleSolver::units() const { return weight_.size(1) / group_; }

const ScaleSolver::Equations& ScaleSolver::equations() const {
  if (equations_) return *equations_;
  const c10::NoGradGuard no_grad;
  const int64_t count = units();
  const at::Tensor weight = weight_.to(at::kDouble);
  // The sum over the columns of u and v of (X^T X) * (W^T W).
  const at::Tensor normal = (gram_ * at::mm(weight.t(), weight))
                                .view({count, group_, count, group_})
                                .sum({1, 3})
                                .to(at::kCPU)
                                .contiguous();
  const at::Tensor right = cross_.view({count, group_}).sum(1).to(at::kCPU).contiguous();
  auto made = std::make_shared<Equations>();
  // Symmetric: the order of storage does not matter.
  made->normal = Eigen::Map<const Eigen::MatrixXd>(normal.const_data_ptr<double>(), count, count);
  made->right = Eigen::Map<const Eigen::VectorXd>(right.const_data_ptr<double>(), count);
  const at::Tensor ones = (sums_ * weight.sum(0)).view({count, group_}).sum(1).to(at::kCPU);
  made->ones = Eigen::Map<const Eigen::VectorXd>(ones.contiguous().const_data_ptr<double>(), count);
  equations_ = std::move(made);
  return *equations_;
}

std::optional<std::vector<double>> ScaleSolver::solve(double damp) const {
  TORCH_CHECK_VALUE(damp >= 0, "damp must not be negative, got ", damp);
  const Equations& found = equations();
  Eigen::MatrixXd a = found.normal;
  a.diagonal().array() += damp * found.normal.diagonal().mean();
  const Eigen::LLT<Eigen::MatrixXd> solver(a);
  if (solver.info() != Eigen::Success) return std::nullopt;
  const Eigen::VectorXd change = solver.solve(found.right);
  if (!change.allFinite()) return std::nullopt;
  std::vector<double> scale(static_cast<size_t>(units()));
  for (Eigen::Index i = 0; i < change.size(); ++i) scale[i] = 1.0 + change[i];
  return scale;
}

std::optional<std::vector<double>> ScaleSolver::solve_released(bool intercept) const {
  const Equations& found = equations();
  const Eigen::Index count = found.right.size(), all = count + (intercept ? 1 : 0);
  Eigen::MatrixXd normal(all, all);
  Eigen::VectorXd right(all);
  normal.topLeftCorner(count, count) = found.normal;
  right.head(count) = found.right;
  if (intercept) {  // a column of ones, whose factor is 1 to begin with, as that of every unit
    normal.col(count).head(count) = found.ones;
    normal.row(count).head(count) = found.ones.transpose();
    normal(count, count) = static_cast<double>(entries_);
    right[count] = residual_sum_;
    right -= normal.col(count);
  }
  Eigen::VectorXd change;
  if (all == 1) {
    change = right / normal(0, 0);
  } else {
    const Eigen::MatrixXd damped =
        normal * normal + Eigen::MatrixXd::Identity(all, all);  // symmetric
    const Eigen::LLT<Eigen::MatrixXd> solver(damped);
    if (solver.info() != Eigen::Success) return std::nullopt;
    change = solver.solve(normal * right);
  }
  if (!change.allFinite()) return std::nullopt;
  std::vector<double> scale(static_cast<size_t>(count));
  for (Eigen::Index i = 0; i < count; ++i) scale[i] = 1.0 + change[i];
  return scale;
}

double ScaleSolver::error(const std::vector<double>& scale) const {
  TORCH_CHECK_VALUE(static_cast<int64_t>(scale.size()) == units(), "scale must have ", units(),
                    " units, got ", scale.size());
  const Equations& found = equations();
  const Eigen::VectorXd change =
      Eigen::Map<const Eigen::VectorXd>(scale.data(), found.right.size()).array() - 1.0;
  const double error =
      residual_ - 2.0 * change.dot(found.right) + change.dot(found.normal * change);
  return std::max(error, 0.0);  // rounding
}

}  // namespace headwise

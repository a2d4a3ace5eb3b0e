#include "headwise/repair.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace headwise {
namespace {

using Matrix = Eigen::MatrixXd;
using RowMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A float64 tensor on the CPU of one or two dimensions, as Eigen has it (a vector is one column).
Matrix matrix_of(const at::Tensor& tensor) {
  const at::Tensor host = tensor.detach().to(at::kCPU, at::kDouble).contiguous();
  const int64_t rows = host.size(0), columns = host.dim() == 2 ? host.size(1) : 1;
  return Eigen::Map<const RowMatrix>(host.const_data_ptr<double>(), rows, columns);
}

at::Tensor tensor_of(const Matrix& matrix, const at::Tensor& like) {
  at::Tensor made = at::empty({matrix.rows(), matrix.cols()}, at::kDouble);
  Eigen::Map<RowMatrix>(made.mutable_data_ptr<double>(), matrix.rows(), matrix.cols()) = matrix;
  return made.to(like.options());
}

}  // namespace

/// Moments as the equations need them: means over tokens, around the means of x and y if a bias
/// absorbs those.
class Reconstruction {
 public:
  Reconstruction(const OutputMoments& moments, bool bias) {
    TORCH_CHECK_VALUE(moments.tokens_ > 0, "moments must be of at least one token, got none");
    const auto tokens = static_cast<double>(moments.tokens_);
    xx = matrix_of(moments.xx_) / tokens;
    xy = matrix_of(moments.xy_) / tokens;
    mean_x = matrix_of(moments.sum_x_) / tokens;
    mean_y = matrix_of(moments.sum_y_) / tokens;
    yy = moments.yy_ / tokens;
    if (bias) {
      xx -= mean_x * mean_x.transpose();
      xy -= mean_x * mean_y.transpose();
      yy -= mean_y.squaredNorm();
    }
    size = xx.rows() == 0 ? 0.0 : xx.diagonal().mean();
  }

  /// Cholesky of xx + ridge size I; false: singular at this ridge.
  bool factorise(double ridge, Eigen::LLT<Matrix>& factor) const {
    Matrix a = xx;
    a.diagonal().array() += ridge * size;
    factor.compute(a);
    if (factor.info() != Eigen::Success || a.rows() == 0) {
      return factor.info() == Eigen::Success;
    }
    // A pivot of the size of rounding errors is 0: the solution would be noise.
    const double rounding = static_cast<double>(a.rows()) * a.diagonal().maxCoeff() *
                            std::numeric_limits<double>::epsilon();
    return factor.matrixLLT().diagonal().minCoeff() > std::sqrt(rounding);
  }

  /// The least of mean |y - W x|^2 + ridge size |W - start|^2 as W^T [E, D]; empty: singular.
  std::optional<Matrix> solve(const Matrix& start, double ridge) const {
    if (size <= 0.0) return start;  // inputs that never vary
    Eigen::LLT<Matrix> factor;
    if (!factorise(ridge, factor)) return std::nullopt;
    return start + factor.solve(xy - xx * start);
  }

  /// mean |y - W x|^2 for W^T [E, D], the bias at its best.
  double error(const Matrix& weight) const {
    return yy - 2.0 * weight.cwiseProduct(xy).sum() + weight.cwiseProduct(xx * weight).sum();
  }

  Matrix xx, xy, mean_x, mean_y;  // [E, E], [E, D], [E, 1], [D, 1]
  double yy = 0.0, size = 0.0;    // size: mean variance of an input
};

namespace {

void check_projection(const OutputMoments& moments, const OutputProjection& projection) {
  const at::Tensor& weight = projection.weight;
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == moments.outputs() &&
                        weight.size(1) == moments.inputs(),
                    "weight must have shape [", moments.outputs(), ", ", moments.inputs(),
                    "], got ", weight.sizes());
  TORCH_CHECK_VALUE(!projection.bias || (projection.bias->dim() == 1 &&
                                         projection.bias->size(0) == moments.outputs()),
                    "bias must have shape [", moments.outputs(), "], got ",
                    projection.bias ? projection.bias->sizes() : at::IntArrayRef());
}

void check_ridge(double ridge) {
  TORCH_CHECK_VALUE(ridge >= 0.0 && std::isfinite(ridge),
                    "ridge must be finite and not negative, got ", ridge);
}

std::optional<OutputProjection> solved(const OutputMoments& moments, const OutputProjection& start,
                                       double ridge) {
  check_projection(moments, start);
  check_ridge(ridge);
  const Reconstruction known(moments, start.bias.has_value());
  const auto weight = known.solve(matrix_of(start.weight).transpose(), ridge);
  if (!weight || !weight->allFinite()) return std::nullopt;
  OutputProjection found;
  found.weight = tensor_of(weight->transpose(), start.weight);
  if (start.bias) {
    const Matrix bias = known.mean_y - weight->transpose() * known.mean_x;
    found.bias = tensor_of(bias, *start.bias).squeeze(1);
  }
  return found;
}

}  // namespace

OutputMoments::OutputMoments(int64_t inputs, int64_t outputs) {
  TORCH_CHECK_VALUE(inputs >= 0 && outputs > 0, "inputs must not be negative and outputs must be ",
                    "positive, got ", inputs, " and ", outputs);
  xx_ = at::zeros({inputs, inputs}, at::kDouble);
  xy_ = at::zeros({inputs, outputs}, at::kDouble);
  sum_x_ = at::zeros({inputs}, at::kDouble);
  sum_y_ = at::zeros({outputs}, at::kDouble);
}

void OutputMoments::add(const at::Tensor& inputs, const at::Tensor& targets) {
  TORCH_CHECK_VALUE(inputs.dim() == 2 && inputs.size(1) == this->inputs(),
                    "inputs must have shape [T, ", this->inputs(), "], got ", inputs.sizes());
  TORCH_CHECK_VALUE(
      targets.dim() == 2 && targets.size(0) == inputs.size(0) && targets.size(1) == outputs(),
      "targets must have shape [", inputs.size(0), ", ", outputs(), "], got ", targets.sizes());
  const c10::NoGradGuard no_grad;
  const at::Tensor x = inputs.to(at::kDouble), y = targets.to(at::kDouble);
  const at::Tensor sum_x = x.sum(0), sum_y = y.sum(0), yy = y.square().sum();
  TORCH_CHECK_VALUE(at::isfinite(sum_x).all().item<bool>(),
                    "inputs must be finite, got NaN or infinity");
  TORCH_CHECK_VALUE(at::isfinite(yy).item<bool>(), "targets must be finite, got NaN or infinity");
  if (tokens_ == 0) {
    for (at::Tensor* moment : {&xx_, &xy_, &sum_x_, &sum_y_}) *moment = moment->to(x.device());
  }
  // Not in place: a copy of these moments shares their tensors.
  xx_ = at::addmm(xx_, x.t(), x);
  xy_ = at::addmm(xy_, x.t(), y);
  sum_x_ = sum_x_ + sum_x;
  sum_y_ = sum_y_ + sum_y;
  yy_ += yy.item<double>();
  tokens_ += x.size(0);
}

void OutputMoments::merge(const OutputMoments& other) {
  TORCH_CHECK_VALUE(other.inputs() == inputs() && other.outputs() == outputs(),
                    "moments must be of ", inputs(), " inputs and ", outputs(), " outputs, got ",
                    other.inputs(), " and ", other.outputs());
  const auto device = xx_.device();
  xx_ = xx_ + other.xx_.to(device);
  xy_ = xy_ + other.xy_.to(device);
  sum_x_ = sum_x_ + other.sum_x_.to(device);
  sum_y_ = sum_y_ + other.sum_y_.to(device);
  yy_ += other.yy_;
  tokens_ += other.tokens_;
}

OutputMoments OutputMoments::select(const std::vector<int64_t>& columns) const {
  for (size_t i = 0; i < columns.size(); ++i) {
    TORCH_CHECK_VALUE(
        columns[i] >= 0 && columns[i] < inputs() && (i == 0 || columns[i] > columns[i - 1]),
        "columns must be ascending and below ", inputs(), ", got ", columns[i],
        i == 0 ? std::string() : " after " + std::to_string(columns[i - 1]));
  }
  const at::Tensor index = at::tensor(columns, at::kLong).to(xx_.device());
  OutputMoments selected(*this);
  selected.xx_ = xx_.index_select(0, index).index_select(1, index);
  selected.xy_ = xy_.index_select(0, index);
  selected.sum_x_ = sum_x_.index_select(0, index);
  return selected;
}

OutputProjection OutputMoments::solve(const OutputProjection& start, double ridge) const {
  auto found = solved(*this, start, ridge);
  TORCH_CHECK(found, "moments of ", tokens_, " tokens are singular at ridge=", ridge,
              ": use a larger ridge or more tokens");
  return *std::move(found);
}

double OutputMoments::error(const OutputProjection& projection) const {
  check_projection(*this, projection);
  const Reconstruction known(*this, true);
  const Matrix weight = matrix_of(projection.weight).transpose();  // [E, D]
  Matrix off = known.mean_y - weight.transpose() * known.mean_x;   // [D, 1]
  if (projection.bias) off -= matrix_of(*projection.bias);
  return std::max(known.error(weight) + off.squaredNorm(), 0.0);  // rounding
}

double OutputMoments::variance() const { return std::max(Reconstruction(*this, true).yy, 0.0); }

Repaired repair_projection(const OutputMoments& fit, const OutputMoments& held_out,
                           const OutputProjection& start, const std::vector<double>& ridges) {
  TORCH_CHECK_VALUE(!ridges.empty(), "ridges must not be empty");
  for (const double ridge : ridges) check_ridge(ridge);
  Repaired best;
  best.projection = start;
  best.variance = held_out.variance();
  best.error_before = best.error_after = held_out.error(start);
  for (const double ridge : ridges) {
    const auto found = solved(fit, start, ridge);
    if (!found) continue;
    const double error = held_out.error(*found);
    if (error >= best.error_after * (1.0 - 1e-9)) continue;  // not by rounding alone
    best.error_after = error;
    best.ridge = ridge;
  }
  if (best.ridge) {
    OutputMoments all = fit;
    all.merge(held_out);
    best.projection = all.solve(start, *best.ridge);
  }
  return best;
}

RemovalOrder removal_order(const OutputMoments& moments, const at::Tensor& weight, int64_t group,
                           double ridge) {
  TORCH_CHECK_VALUE(group > 0 && moments.inputs() % group == 0,
                    "group must be positive and divide the ", moments.inputs(), " inputs, got ",
                    group);
  check_projection(moments, {weight, std::nullopt});
  check_ridge(ridge);
  const Reconstruction known(moments, true);
  const int64_t units = moments.inputs() / group;
  RemovalOrder order;
  std::vector<int64_t> left(units);
  for (int64_t unit = 0; unit < units; ++unit) left[unit] = unit;
  const Matrix start = matrix_of(weight).transpose();
  auto solution = known.solve(start, ridge);
  Eigen::LLT<Matrix> factor;
  if (known.size > 0.0) {
    TORCH_CHECK(solution && known.factorise(ridge, factor), "moments of ", moments.tokens(),
                " tokens are singular at ridge=", ridge, ": use a larger ridge or more tokens");
  }
  Matrix w = *solution;  // [E, D]: rows of removed units are 0
  Matrix inverse = known.size > 0.0 ? Matrix(factor.solve(Matrix::Identity(w.rows(), w.rows())))
                                    : Matrix(Matrix::Identity(w.rows(), w.rows()));
  while (!left.empty()) {
    size_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    Matrix correction;  // (inverse_gg)^-1 W_g of the best
    for (size_t i = 0; i < left.size(); ++i) {
      const int64_t at = left[i] * group;
      const Matrix own = w.middleRows(at, group);  // [d, D]
      const Matrix solved = inverse.block(at, at, group, group).llt().solve(own);
      const double cost = own.cwiseProduct(solved).sum();
      if (cost < least) {
        least = cost;
        best = i;
        correction = solved;
      }
    }
    TORCH_CHECK(std::isfinite(least), "moments of ", moments.tokens(),
                " tokens are singular at ridge=", ridge, ": use a larger ridge or more tokens");
    const int64_t unit = left[best], at = unit * group;
    const Matrix columns = inverse.middleCols(at, group);  // [E, d]
    w -= columns * correction;
    inverse -= columns * inverse.block(at, at, group, group).llt().solve(columns.transpose());
    // Exactly 0, and a block that can be inverted: the unit no longer takes part.
    w.middleRows(at, group).setZero();
    inverse.middleRows(at, group).setZero();
    inverse.middleCols(at, group).setZero();
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(best));
    order.units.push_back(unit);
    order.error.push_back(std::max(known.error(w), 0.0));
  }
  return order;
}

}  // namespace headwise

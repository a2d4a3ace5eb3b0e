// Repair: an output projection that compensates for pruned heads or neurons.
//
// The rest of a layer gets the weights that come nearest, in least squares, to the whole layer's
// output: the reconstruction of OSSCAR (arXiv 2403.12983), ZipLM (2302.04089) and SlimGPT
// (2412.18110), with a ridge. Only second moments of the data are kept, in float64.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "headwise/export.h"

namespace headwise {

/// The projection from the outputs of heads (or the activations of neurons) to a layer's output.
struct OutputProjection {
  at::Tensor weight;               ///< [D, E]
  std::optional<at::Tensor> bias;  ///< [D]; none: the layer has none
};

/// First and second moments of the inputs of an output projection, x [E], and of its target
/// outputs, y [D], summed over tokens. Their size does not depend on the number of tokens.
class HEADWISE_API OutputMoments {
 public:
  /// @throws c10::ValueError if a size is negative, or `outputs` is 0
  OutputMoments(int64_t inputs, int64_t outputs);

  /// @param inputs [T, E] and @param targets [T, D], of the same device as those before
  /// @throws c10::ValueError if a shape does not fit or a value is NaN or infinite; nothing is
  /// added
  void add(const at::Tensor& inputs, const at::Tensor& targets);
  /// The tokens of `other` too. @throws c10::ValueError if its sizes differ
  void merge(const OutputMoments& other);
  /// The moments of some inputs only. @param columns ascending, each below inputs()
  OutputMoments select(const std::vector<int64_t>& columns) const;

  int64_t inputs() const { return sum_x_.size(0); }
  int64_t outputs() const { return sum_y_.size(0); }
  int64_t tokens() const { return tokens_; }

  /// The projection that minimises, over weight and bias,
  ///   mean |y - W x - b|^2 + ridge s |W - W_start|^2,
  /// where s is the mean variance of an input (with no bias its mean square): so `ridge` has no
  /// unit. With a large ridge it is `start` with a bias that corrects the mean.
  /// @param start its weight may be of any floating dtype and device; the result has the same
  /// @throws c10::ValueError for no tokens, a shape that does not fit, or a negative ridge
  /// @throws c10::Error if the moments are singular at this ridge
  OutputProjection solve(const OutputProjection& start, double ridge) const;

  /// mean |y - W x - b|^2: summed over outputs, averaged over tokens.
  double error(const OutputProjection& projection) const;
  /// The mean of |y - mean y|^2: the error of the best constant.
  double variance() const;

  friend class Reconstruction;

 private:
  int64_t tokens_ = 0;
  at::Tensor xx_;  // float64 [E, E]: sum of x x^T
  at::Tensor xy_;  // float64 [E, D]: sum of x y^T
  at::Tensor sum_x_, sum_y_;
  double yy_ = 0.0;  // sum of |y|^2
};

/// The result of repair_projection.
struct Repaired {
  OutputProjection projection;
  std::optional<double> ridge;  ///< none: no ridge was better than `start`, which is kept
  double error_before = 0;      ///< mean squared error of `start` on held-out tokens
  double error_after = 0;       ///< of the solution on the same tokens
  double variance = 0;          ///< of the targets on the same tokens: what errors are relative to
};

/// The solution for the ridge that has the least error on held-out tokens, computed once more from
/// the tokens of both. If no ridge is better than `start`, that is kept.
/// @param ridges each at least 0; those at which the moments are singular are left out
/// @throws c10::ValueError for no ridges, no tokens, or a shape that does not fit
HEADWISE_API Repaired repair_projection(const OutputMoments& fit, const OutputMoments& held_out,
                                        const OutputProjection& start,
                                        const std::vector<double>& ridges);

/// The order of removal_order, and the cost of each removal.
struct RemovalOrder {
  std::vector<int64_t> units;  ///< all of them, in the order of removal
  std::vector<double> error;   ///< mean squared error after each removal, the rest repaired
};

/// Greedy removal of a layer's units, each time of the one for which the others compensate best:
/// the exact increase of the least squares error (optimal brain surgeon with groups, as in ZipLM).
/// @param moments of the whole layer: inputs are units * group columns
/// @param weight [D, units * group], of the whole layer: the centre of the ridge
/// @param group columns of a unit: the width of a head, 1 for neurons
/// @throws c10::ValueError if `group` does not divide the inputs, and as OutputMoments::solve
HEADWISE_API RemovalOrder removal_order(const OutputMoments& moments, const at::Tensor& weight,
                                        int64_t group, double ridge);

}  // namespace headwise

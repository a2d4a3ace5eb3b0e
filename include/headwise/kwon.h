// Pruning without retraining: Kwon et al. 2022, "A Fast Post-Training Pruning Framework for
// Transformers" (arXiv 2204.09656). Which units stay under a limit of cost, by the Fisher
// information of their masks, and scales of the rest that compensate for the pruned ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "headwise/export.h"

namespace headwise {

/// Gradients of the loss with respect to masks, one row per mini-batch. The Fisher information of
/// unit i is sum over mini-batches of (dL/dm_i)^2 (section 3.2 of the paper).
class HEADWISE_API FisherAccumulator {
 public:
  /// @param gradient [U], of one mini-batch's mean loss with respect to the masks of `layer`
  /// @throws c10::ValueError if it is not finite, or of another size than before
  void add(const std::string& layer, const at::Tensor& gradient);
  /// float64 [batches, U]. @throws c10::IndexError for a layer without gradients
  at::Tensor gradients(const std::string& layer) const;
  /// The Fisher information of each unit.
  std::vector<double> scores(const std::string& layer) const;

 private:
  std::map<std::string, std::vector<std::vector<double>>> rows_;
};

using UnitScores = std::vector<std::vector<double>>;    ///< of each unit, by layer
using UnitIndices = std::vector<std::vector<int64_t>>;  ///< ascending, by layer

/// The units that a search keeps.
struct KeptUnits {
  UnitIndices heads;    ///< by attention layer
  UnitIndices neurons;  ///< by feed-forward network
  double score = 0;     ///< sum over the kept units
  double cost = 0;      ///< of the kept units; never above the limit
};

/// The units kept under a limit on multiply-accumulates (algorithm 1): for each number of heads the
/// most important ones, with the rest of the limit spent on the most important neurons; the best
/// sum of scores wins. Ties keep the lower layer, then the lower unit; of equal sums fewer heads.
/// Heads all cost the same, and neurons do.
/// @throws c10::ValueError if a score is negative or not finite, all scores are 0, a cost is not
///         positive, or the limit is negative
HEADWISE_API KeptUnits search_macs(const UnitScores& heads, const UnitScores& neurons,
                                   double head_cost, double neuron_cost, double limit);

/// Time of a layer as a function of its units: none without units, `base` up to `threshold` units,
/// then `slope` more for each.
struct HEADWISE_API LatencyFit {
  double base = 0;
  int64_t threshold = 0;
  double slope = 0;
  double seconds(int64_t units) const;
};

/// The least squares fit of measured times; slope >= 0, and a threshold among `units`.
/// @param units ascending, different, at least two
/// @throws c10::ValueError if they are not, or seconds do not have the same length or are not
/// positive and finite
HEADWISE_API LatencyFit fit_latency(const std::vector<int64_t>& units,
                                    const std::vector<double>& seconds);

/// The units kept under a limit on time, found as in the authors' code: for each number of
/// attention layers and of networks that are dropped whole (those whose `threshold` most important
/// units score least; at least one of each stays), every other layer keeps its `threshold` most
/// important units, which cost no more than fewer would, and the rest of the limit is spent as in
/// search_macs. The best sum of scores wins.
/// @throws c10::ValueError as search_macs, or if the limit is below what one attention layer and
///         one network take at their thresholds; the text names it
HEADWISE_API KeptUnits search_latency(const UnitScores& heads, const UnitScores& neurons,
                                      const LatencyFit& head_time, const LatencyFit& neuron_time,
                                      double limit);

/// The same number of units of a layer as `kept`, but such that the pruned ones have a small joint
/// effect (algorithm 2, on the layer's block of the Fisher matrix): in ascending order of
/// importance, each kept unit joins the pruned ones, and the unit whose return minimises the
/// squared norm of their summed gradients is kept instead. That norm never grows.
/// @param gradients [batches, U], of FisherAccumulator
/// @param kept ascending
HEADWISE_API std::vector<int64_t> rearrange(const at::Tensor& gradients,
                                            const std::vector<int64_t>& kept);

/// Scales of a layer's units that bring its output to the residual stream near a teacher's (section
/// 3.4): minimises |Y_teacher - Y(s)|^2 + damp m |s - 1|^2 over one scale per unit, where Y(s) =
/// rest + sum_u s_u x_u W_u, and m is the mean of |x_u W_u|^2 over units. So damp has no unit: it
/// means the same for any number of tokens and any size of the units' outputs. The normal equations
/// are summed up batch by batch; of the design matrix [tokens * D, U] only X^T X is needed.
class HEADWISE_API ScaleSolver {
 public:
  /// @param weight [D, E]: the projection of the units, E = units * group
  /// @param group columns of `weight` a unit has: the width of a head, 1 for neurons
  ScaleSolver(const at::Tensor& weight, int64_t group);
  /// @param inputs [T, E]: the units' outputs for T tokens, with scales 1
  /// @param residual [T, D]: the teacher's output minus the layer's output with scales 1
  void add(const at::Tensor& inputs, const at::Tensor& residual);
  /// The scales; none if the equations have no finite solution.
  std::optional<std::vector<double>> solve(double damp) const;
  /// The scales that the authors' code computes with LSMR: 1 + x with the x that minimises
  /// |N x - b|^2 + |x|^2, where N x = b are the normal equations.
  /// @param intercept also fit one number that is added to the layer's whole output, and leave it
  ///        out, as the authors do for heads
  std::optional<std::vector<double>> solve_released(bool intercept) const;
  /// |Y_teacher - Y(scale)|^2 over the tokens that were added, without the ridge.
  double error(const std::vector<double>& scale) const;
  int64_t units() const;

 private:
  struct Equations;
  const Equations& equations() const;

  at::Tensor weight_;  // [D, E]
  int64_t group_;
  at::Tensor gram_;                                     // float64 [E, E]
  at::Tensor cross_;                                    // float64 [E]
  at::Tensor sums_;                                     // float64 [E], of the inputs
  double residual_ = 0.0;                               // |residual|^2
  double residual_sum_ = 0.0;                           // of its entries
  int64_t entries_ = 0;                                 // tokens * D
  mutable std::shared_ptr<const Equations> equations_;  // of all that was added
};

}  // namespace headwise

// What was selected and why, recorded on request.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/selection.h"

namespace headwise {

/// How a layer, or a model, distributed its heads over the inputs of a trace.
struct TraceSummary {
  int64_t sequences = 0;     ///< inputs seen
  double mean_heads = 0;     ///< mean number of heads that ran
  double mean_fraction = 0;  ///< mean_heads / all heads, in [0, 1]
  double std_fraction = 0;   ///< standard deviation over inputs of the fraction; 0: the same budget
  /// Mean over pairs of inputs of 1 - |A and B| / |A or B|, where A and B are the sets of heads
  /// that ran (two empty sets: 0). 0: every input ran the same heads. Empty with fewer than two
  /// inputs.
  std::optional<double> mean_jaccard_distance;
};

/// The selections of a model's layers, call by call. Recording keeps detached copies on their
/// device without waiting for it; reading brings them to the CPU.
class HEADWISE_API Trace {
 public:
  /// Appends what the gate of `layer` chose in one forward.
  /// @throws c10::TypeError if index or count is not int32
  /// @throws c10::ValueError if shapes do not fit [B, num_heads] and [B], or the layer was recorded
  ///         with another number of heads
  void record(const std::string& layer, int64_t num_heads, const Selection& selection);

  /// Names, in the order of their first call.
  const std::vector<std::string>& layers() const { return order_; }

  /// Number of heads of a layer. @throws c10::IndexError if nothing was recorded under the name.
  int64_t num_heads(const std::string& layer) const;

  /// Every call's selection, oldest first. @throws c10::IndexError as num_heads.
  const std::vector<Selection>& history(const std::string& layer) const;

  /// Over all calls of one layer. @throws c10::IndexError as num_heads;
  /// c10::ValueError if a selection names heads that do not exist.
  TraceSummary summary(const std::string& layer) const;

  /// Over the whole model: an input's heads are those of all layers together. Empty if nothing was
  /// recorded or layers saw different numbers of inputs (one ran more often than another).
  std::optional<TraceSummary> summary() const;

  /// The trace as JSON (format "headwise.trace", version 1; docs/interpretability.md).
  /// indent < 0: on one line.
  std::string to_json(int indent = -1) const;

  void clear();

 private:
  struct Layer {
    int64_t num_heads;
    std::vector<Selection> calls;
  };
  const Layer& layer(const std::string& name) const;

  std::vector<std::string> order_;
  std::map<std::string, Layer> layers_;
};

}  // namespace headwise

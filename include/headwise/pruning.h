// Plans (which heads stay), and removing the other heads from the weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/importance.h"
#include "headwise/weights.h"

namespace headwise {

/// The heads of one layer that stay.
struct LayerPlan {
  std::string name;            ///< of the layer, in the model
  int64_t num_heads = 0;       ///< of the layer, before
  std::vector<int64_t> heads;  ///< those that stay, ascending
  std::vector<double> scale;   ///< of each that stays: multiplies its output
  bool operator==(const LayerPlan&) const = default;
};

/// Which heads of a model stay, layer by layer, and their scales. Layers may keep different
/// numbers, down to none.
class HEADWISE_API HeadPlan {
 public:
  /// @param metadata a JSON object, as text
  /// @throws c10::ValueError if heads are not ascending, unique and in [0, num_heads), a scale is
  ///         missing or not finite, or a name occurs twice
  explicit HeadPlan(std::vector<LayerPlan> layers, std::string metric = "",
                    std::string metadata = "{}");

  const std::vector<LayerPlan>& layers() const { return layers_; }
  const std::string& metric() const { return metric_; }
  const std::string& metadata() const { return metadata_; }
  int64_t num_heads() const;   ///< of all layers, before
  int64_t heads_kept() const;  ///< of all layers
  bool operator==(const HeadPlan&) const = default;

  /// {"format": "headwise.plan", "version": 1, "metric",
  ///  "layers": [{"name", "num_heads", "heads", "scale"}], "metadata"}
  std::string to_json(int indent = 1) const;
  /// @throws c10::ValueError naming the key that is unknown, missing or wrong
  static HeadPlan from_json(const std::string& text);
  /// To and from a file (see files.h). @throws FileError
  void save(const std::string& path) const;
  static HeadPlan load(const std::string& path);

 private:
  std::vector<LayerPlan> layers_;
  std::string metric_;
  std::string metadata_;
};

/// Keeps the most important fraction `keep` of the heads: round(keep * heads), but at least one, of
/// the model or of each layer. Ties: the lower layer, then the lower head is kept. Scales are 1.
/// The largest scores are the most important; of the metric "entropy" the smallest.
/// @param min_heads_per_layer heads that every layer keeps (all, if it has fewer)
/// @param scope one ranking of the model's heads, so that layers keep different numbers, or one per
///        layer, so that every layer keeps the same fraction
/// @throws c10::ValueError if a score is not finite, keep is outside (0, 1], or min_heads_per_layer
/// is negative or requires more heads than keep leaves
HEADWISE_API HeadPlan plan(const HeadScores& scores, double keep = 0.5,
                           int64_t min_heads_per_layer = 0, Scope scope = Scope::model);

/// The parameters of an attention layer with only `heads` left: their rows of the input projections
/// and biases, their columns of the output projection, multiplied by `scale`. The output bias
/// stays. The result computes the same as the layer with the other heads' outputs set to 0.
/// @param parameters by their names in torch.nn.MultiheadAttention: in_proj_weight [3E, D] or
///        q_/k_/v_proj_weight [E, ...], in_proj_bias [3E], bias_k and bias_v [1, 1, E],
///        out_proj.weight [D, E], out_proj.bias [D]; each may be missing. Device and dtype stay.
/// @throws c10::ValueError on an unknown name, a shape that num_heads does not divide, or heads and
///         scale as in HeadPlan
HEADWISE_API NamedTensors prune_projections(const NamedTensors& parameters, const LayerPlan& layer);

class MultiheadAttention;     // multihead_attention.h
class GroupedQueryAttention;  // grouped_query_attention.h

/// The plan that is equivalent to a layer's static gate (FixedGate, HardConcreteGate without
/// input_dependent) in evaluation: a head's scale is its weight from the gate; heads of weight 0
/// are dropped. prune(layer, plan_from_gate(layer)) compacts a trained static gate.
/// @throws c10::ValueError if the layer has no gate, or one whose choice depends on the input
HEADWISE_API LayerPlan plan_from_gate(const MultiheadAttention& layer,
                                      const std::string& name = "");
/// The same of query heads; a GroupGate around a static gate is static, too.
HEADWISE_API LayerPlan plan_from_gate(const GroupedQueryAttention& layer,
                                      const std::string& name = "");

/// A layer with only the heads of `layer` that `plan` keeps, with its scales: physically smaller,
/// and equal to `layer` under a FixedGate of these scales. Its num_heads is the number of remaining
/// heads, down to 0 (the output is then the output bias); head_dim stays. Its parameters are new.
/// @throws c10::ValueError if the plan is for another number of heads, or the layer has a gate that
///         chooses for each input
HEADWISE_API MultiheadAttention prune(const MultiheadAttention& layer, const LayerPlan& plan);
/// The same of query heads. Key/value heads that no kept query head reads are removed too, from the
/// weights and so from the cache. If the remaining groups differ in size, the option
/// key_value_heads maps query heads to them.
HEADWISE_API GroupedQueryAttention prune(const GroupedQueryAttention& layer, const LayerPlan& plan);

}  // namespace headwise

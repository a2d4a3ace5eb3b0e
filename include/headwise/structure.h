// Structured pruning plans (heads, neurons, blocks, hidden dimensions), and applying them to
// weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/pruning.h"
#include "headwise/weights.h"

namespace headwise {

/// The neurons of one feed-forward network that stay. Its first linear layer gives them, after the
/// activation they are scaled, the second linear layer reads them.
struct FfnPlan {
  std::string name;              ///< of the first linear layer, in the model
  int64_t num_neurons = 0;       ///< before
  std::vector<int64_t> neurons;  ///< those that stay, ascending
  std::vector<double> scale;     ///< of each that stays: multiplies its activation
  bool operator==(const FfnPlan&) const = default;
};

/// The factor of the whole output of an attention layer or a feed-forward network, bias included.
/// 0: the block is removed, and in a post-norm layer the layer norm after it, so that the stream
/// passes unchanged. A block without neurons still adds its bias.
struct BlockPlan {
  std::string name;  ///< of the attention layer, or of the first linear layer
  double scale = 1.0;
  bool operator==(const BlockPlan&) const = default;
};

/// The dimensions of the residual stream that stay. Layer norms are over these only.
struct HiddenPlan {
  int64_t size = 0;                 ///< of the stream, before
  std::vector<int64_t> dimensions;  ///< those that stay, ascending; at least one
  std::vector<double> scale;        ///< of each that stays: multiplies what is written to it
  bool operator==(const HiddenPlan&) const = default;
};

/// A HeadPlan and plans for other parts of a transformer. Parts that it does not name are
/// unchanged.
class HEADWISE_API StructurePlan {
 public:
  /// @param metadata a JSON object, as text
  /// @throws c10::ValueError if units are not ascending, different and in range, a scale is missing
  ///         or not finite, a name occurs twice, no hidden dimension is left, or a removed block
  /// (scale 0) has heads or neurons left
  explicit StructurePlan(HeadPlan heads, std::vector<FfnPlan> ffn = {},
                         std::vector<BlockPlan> blocks = {},
                         std::optional<HiddenPlan> hidden = std::nullopt,
                         std::string metadata = "{}");

  const HeadPlan& heads() const { return heads_; }
  const std::vector<FfnPlan>& ffn() const { return ffn_; }
  const std::vector<BlockPlan>& blocks() const { return blocks_; }
  const std::optional<HiddenPlan>& hidden() const { return hidden_; }
  const std::string& metadata() const { return metadata_; }
  double block_scale(const std::string& name) const;  ///< 1 if the plan does not name it
  int64_t num_neurons() const;                        ///< of all networks named, before
  int64_t neurons_kept() const;
  bool operator==(const StructurePlan&) const = default;

  /// {"format": "headwise.structure", "version": 1, "heads": a "headwise.plan" document,
  ///  "ffn": [{"name", "num_neurons", "neurons", "scale"}], "blocks": [{"name", "scale"}],
  ///  "hidden": {"size", "dimensions", "scale"} or null, "metadata"}
  std::string to_json(int indent = 1) const;
  /// Also reads a "headwise.plan" document: a plan of heads alone.
  /// @throws c10::ValueError naming the key that is unknown, missing or wrong
  static StructurePlan from_json(const std::string& text);
  /// To and from a file (see files.h). @throws FileError
  void save(const std::string& path) const;
  static StructurePlan load(const std::string& path);

 private:
  HeadPlan heads_;
  std::vector<FfnPlan> ffn_;
  std::vector<BlockPlan> blocks_;
  std::optional<HiddenPlan> hidden_;
  std::string metadata_;
};

/// prune_projections of a layer whose whole output is multiplied by `block_scale`, folded into
/// out_proj. With 0 nothing is left: no heads and no biases.
HEADWISE_API NamedTensors prune_attention(const NamedTensors& parameters, const LayerPlan& layer,
                                          double block_scale = 1.0);

/// The parameters of a feed-forward network with only the neurons of `plan` left: their rows and
/// biases in the first linear layer, their columns in the second, multiplied by their scales. The
/// output bias stays, multiplied by `block_scale`; with 0 it is removed too.
/// @param parameters linear1.weight [F, D], linear1.bias [F], linear2.weight [D, F],
///        linear2.bias [D]; biases may be missing
/// @throws c10::ValueError on an unknown name or sizes that are not the plan's
HEADWISE_API NamedTensors prune_ffn(const NamedTensors& parameters, const FfnPlan& plan,
                                    double block_scale = 1.0);

/// The kept hidden dimensions of `parameter` along `dim`, with `scaled` multiplied by their scales.
/// @throws c10::ValueError if its size along `dim` is not the plan's
HEADWISE_API at::Tensor prune_hidden(const at::Tensor& parameter, int64_t dim,
                                     const HiddenPlan& plan, bool scaled);

/// Layer norm over the dimensions whose mask is not 0; the others are 0 in the result.
/// @param x [..., D], mask [D], weight and bias [D]
/// @param scaled multiply the result by the mask
HEADWISE_API at::Tensor masked_layer_norm(const at::Tensor& x, const at::Tensor& mask,
                                          const std::optional<at::Tensor>& weight,
                                          const std::optional<at::Tensor>& bias, double eps,
                                          bool scaled);

}  // namespace headwise

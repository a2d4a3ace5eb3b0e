// Why these heads: one input explained, as JSON (docs/interpretability.md has the schema).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "headwise/export.h"
#include "headwise/multihead_attention.h"
#include "headwise/weights.h"

namespace headwise {

/// A head of a site: {number of the site, number of the head in its layer}.
using SiteHead = std::pair<int64_t, int64_t>;

/// The contents of an explanation besides the grid of heads.
struct HEADWISE_API ExplainOptions {
  /// Strongest token pairs listed for each head.
  TORCH_ARG(int64_t, pairs) = 5;
  /// Nodes of the quadrature of integrated gradients.
  TORCH_ARG(int64_t, steps) = 32;
  /// Attention maps of every head.
  TORCH_ARG(bool, all_maps) = false;
  /// Attention maps of these heads.
  TORCH_ARG(std::vector<SiteHead>, maps);
  /// Measure the effect of toggling each head on the prediction (explain() only).
  TORCH_ARG(bool, effects) = true;
  /// Heads toggled in one forward of the model, each on a copy of its input.
  TORCH_ARG(int64_t, batch_size) = 32;
};

/// Collects the records of one forward of a model on a batch and the effects of interventions, and
/// writes the explanation of every input. explain() drives it in C++ and headwise.explain in
/// Python.
///
/// A *site* is one call of an attention layer: a layer that a forward runs several times (shared
/// weights) has a site for each. Sites are numbered in the order of the calls.
class HEADWISE_API Explanation {
 public:
  explicit Explanation(ExplainOptions options = {});
  ~Explanation();
  Explanation(Explanation&&) noexcept;
  Explanation& operator=(Explanation&&) noexcept;

  /// Adds the next site.
  /// @param gate         the gate's configuration as tagged JSON, "" without a gate
  /// @param gate_tensors its parameters and buffers by name
  /// @throws c10::ValueError for another batch size than before, shapes that do not fit, or a head
  ///         to draw that the layer does not have
  void add_layer(const std::string& name, int64_t num_heads, const std::string& gate,
                 const NamedTensors& gate_tensors, const AttentionProbe& probe);

  /// The forward's class scores [B, C], C >= 2, and the names of the classes.
  /// @param labels empty, or one per class
  /// @throws c10::ValueError for other shapes or scores that are not finite
  void set_prediction(const at::Tensor& logits, const std::vector<std::string>& labels = {});

  /// The inputs' texts (empty: none) and tokens, without padding (empty: none).
  /// @throws c10::ValueError for another number of inputs
  void set_inputs(const std::vector<std::string>& texts,
                  const std::vector<std::vector<std::string>>& tokens);

  int64_t num_inputs() const;
  /// Heads of all sites together.
  int64_t num_heads() const;

  /// Weights for forwards in which one head each is toggled: head begin, begin + 1, ... end - 1 of
  /// all heads, in the order of sites. The weight of a chosen head becomes 0, that of another one
  /// 1; everything else stays as the gates chose. -> a tensor [end - begin, H] for each site
  std::vector<at::Tensor> switched(int64_t input, int64_t begin, int64_t end) const;

  /// The results of those forwards: logits [end - begin, C].
  /// @throws c10::ValueError for another shape, scores that are not finite, or without a prediction
  void add_effects(int64_t input, int64_t begin, const at::Tensor& logits);

  /// The document, format "headwise.explanation".
  std::string to_json(int indent = -1) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Explains the inputs of one batch.
/// @param layers     the model's attention layers by name (Model::layers), in evaluation mode
/// @param batch      number of inputs
/// @param forward_fn runs the model on the inputs `rows` (int64 [N], numbers of inputs, which may
///                   repeat) and returns class scores [N, C], or an undefined tensor if the model
///                   has none (then effects are not reported)
/// @return JSON, format "headwise.explanation"
/// @throws c10::ValueError if forward_fn calls no layer, or its result is invalid for Explanation
HEADWISE_API std::string explain(
    const std::vector<std::pair<std::string, MultiheadAttention>>& layers, int64_t batch,
    const std::function<at::Tensor(const at::Tensor& rows)>& forward_fn,
    const ExplainOptions& options = {}, const std::vector<std::vector<std::string>>& tokens = {},
    const std::vector<std::string>& labels = {});

}  // namespace headwise

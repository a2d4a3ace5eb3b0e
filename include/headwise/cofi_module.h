// CoFi as a module: masks on the heads, blocks, neurons and hidden dimensions of a model that its
// owner runs. The same options, parameters and numbers as headwise.CoFi in Python, whose
// documentation has the formulas and their sources.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "headwise/export.h"
#include "headwise/layers.h"
#include "headwise/structure.h"

namespace headwise {

/// A feed-forward network, by the name of its first linear layer, and how many neurons it has.
struct FfnSize {
  std::string name;
  int64_t num_neurons = 0;
};

/// Options of CoFi.
struct HEADWISE_API CoFiOptions {
  /// The sparsity: the share of the weights of heads and feed-forward networks that goes, in [0,
  /// 1).
  TORCH_ARG(double, target) = 0.5;
  /// Mask heads.
  TORCH_ARG(bool, heads) = true;
  /// Mask whole attention layers.
  TORCH_ARG(bool, attention_blocks) = true;
  /// Mask neurons of the feed-forward networks.
  TORCH_ARG(bool, neurons) = true;
  /// Mask whole feed-forward networks.
  TORCH_ARG(bool, ffn_blocks) = true;
  /// Mask dimensions of the residual stream: forward then has to multiply what is written to it by
  /// hidden() and to normalise by masked_layer_norm.
  TORCH_ARG(bool, hidden) = false;
  /// Progress, in [0, 1], at which the penalty asks for `target`.
  TORCH_ARG(double, warmup) = 0.2;
  /// Mean of the logits at the start, std 0.01; held within +-4.605.
  TORCH_ARG(double, init_log_alpha) = 10.0;
  /// Temperature of the samples, and the ends of the stretch.
  TORCH_ARG(double, beta) = 2.0 / 3.0;
  TORCH_ARG(double, gamma) = -0.1;
  TORCH_ARG(double, zeta) = 1.1;
};

/// Masks that are trained together with a model (Xia et al. 2022, arXiv 2204.00408).
///
/// Heads are masked by the layers themselves, for as long as this module lives. The rest is the
/// owner's to apply in the model's forward: multiply the output of an attention layer or a
/// feed-forward network by block(name), a network's activations by neurons(name). Call draw()
/// before every forward.
///
/// Parameters: logits.heads.0 [H], logits.attention.0 [layers], logits.neurons.0 [F], logits.ffn.0
/// [networks], logits.hidden.0 [D], where they are masked, and multipliers [2]. Buffers: progress
/// [], shift [2].
/// Example: CoFi cofi(attention_layers(*model), {{"ffn", 1536}}, CoFiOptions().target(0.6));
class HEADWISE_API CoFiImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError for a target that the masks cannot reach (the text names the nearest),
  ///         no masks at all, layers of different widths, or a layer that has a gate
  CoFiImpl(AttentionLayers layers, std::vector<FfnSize> ffn, CoFiOptions options = {});
  ~CoFiImpl() override;
  CoFiImpl(const CoFiImpl&) = delete;
  CoFiImpl& operator=(const CoFiImpl&) = delete;

  /// Sets the masks of the next forward: samples in training, those of plan() in evaluation.
  /// @throws c10::ValueError if logits are not finite
  void draw();
  /// What multiplies the output of an attention layer or network [].
  at::Tensor block(const std::string& name) const;
  /// What multiplies the activations of a network [F].
  at::Tensor neurons(const std::string& name) const;
  /// What multiplies the heads of a layer [H]; the layer does it.
  at::Tensor heads(const std::string& name) const;
  /// What multiplies whatever is written to the residual stream [D].
  at::Tensor hidden() const { return values_[4].at(0); }

  /// Share of the weights that is expected to go, differentiable [].
  at::Tensor expected_sparsity() const;
  /// What holds the expected sparsity to the target: add it to the loss [].
  at::Tensor penalty() const;
  /// Sets how far training has come, from 0 to 1.
  void anneal(double progress);
  /// Starts all masks anew.
  void reset_masks(double init_log_alpha = 10.0);
  /// Starts the masks of heads and neurons from a ranking: logits of init_log_alpha + sharpness
  /// (rank - 1/2), rank in [0, 1] over all layers.
  /// @param importance attention layer or network -> scores of its heads or neurons
  /// @throws c10::ValueError for no or not as many scores, or scores that are not finite
  void start(const std::map<std::string, at::Tensor>& importance, double sharpness = 6.0);
  /// Share of the weights that goes, by the masks of evaluation.
  double sparsity() const;
  /// What stays, with the values of the masks as scales. Where it would miss the target by more
  /// than `tolerance`, `shift` is found first; a warning says where blocks put it out of reach.
  StructurePlan plan(double tolerance = 0.005);
  /// The logits of all masks.
  std::vector<at::Tensor> mask_parameters() const;

  CoFiOptions options;
  at::Tensor multipliers, progress, shift;

 private:
  // By group: heads, attention, neurons, ffn, hidden; ones where a group is not masked.
  using Values = std::array<std::vector<at::Tensor>, 5>;
  template <typename Make>
  Values each(Make make) const;
  Values constant_values() const;
  at::Tensor size_of(const Values& values) const;
  double sparsity_of(const Values& values) const;
  void check_reachable() const;

  AttentionLayers layers_;
  std::vector<FfnSize> ffn_;
  std::array<std::vector<at::Tensor>, 5> logits_;
  std::array<std::vector<int64_t>, 5> sizes_;
  std::vector<int64_t> head_dims_;
  Values values_;
  double size_ = 0;
  int finest_ = -1;  // the group that makes up for what the others leave
};
TORCH_MODULE(CoFi);

}  // namespace headwise

// Multi-head attention that runs only the heads its gate chooses.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <tuple>

#include "headwise/attention.h"
#include "headwise/export.h"
#include "headwise/gates.h"

namespace headwise {

/// Options of MultiheadAttention: those of torch.nn.MultiheadAttention, and a gate.
/// Example: MultiheadAttentionOptions(768, 12).batch_first(true).gate(BudgetGateOptions())
struct HEADWISE_API MultiheadAttentionOptions {
  MultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads)
      : embed_dim_(embed_dim), num_heads_(num_heads) {}

  /// Width of the model, D.
  TORCH_ARG(int64_t, embed_dim);
  /// Heads, H.
  TORCH_ARG(int64_t, num_heads);
  /// Dropout probability on the attention probabilities.
  TORCH_ARG(double, dropout) = 0.0;
  /// Whether the projections have a bias.
  TORCH_ARG(bool, bias) = true;
  /// Adds a learned row of keys and values.
  TORCH_ARG(bool, add_bias_kv) = false;
  /// Adds a row of zeros to keys and values.
  TORCH_ARG(bool, add_zero_attn) = false;
  /// Features of the keys; default embed_dim.
  TORCH_ARG(std::optional<int64_t>, kdim) = std::nullopt;
  /// Features of the values; default embed_dim.
  TORCH_ARG(std::optional<int64_t>, vdim) = std::nullopt;
  /// Inputs and output are [B, L, D] instead of [L, B, D].
  TORCH_ARG(bool, batch_first) = false;
  /// Device of the parameters.
  TORCH_ARG(std::optional<at::Device>, device) = std::nullopt;
  /// Type of the parameters.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = std::nullopt;
  /// The gate; none: every head runs.
  TORCH_ARG(std::optional<GateOptions>, gate) = std::nullopt;
  /// Width of a head if not embed_dim / num_heads (a pruned layer); num_heads may then be 0.
  TORCH_ARG(std::optional<int64_t>, head_dim) = std::nullopt;
};

/// What a recorder set as MultiheadAttentionImpl::probe receives in each forward.
struct AttentionProbe {
  at::Tensor x;                                  ///< [B, L, D] the queries: the gate's input
  std::optional<at::Tensor> query_padding_mask;  ///< [B, L] their padding
  std::optional<Selection> selection;            ///< empty without a gate
  at::Tensor q, k;                               ///< [B, H, L, d], [B, H, S', d], every head
  AttentionArguments arguments;                  ///< masks over the first S' - added_keys keys
  int64_t added_keys = 0;
  at::Tensor context;  ///< [B, H, L, d] every head's output, part of the graph;
                       ///< undefined unless MultiheadAttentionImpl::probe_context is set
};

/// torch.nn.MultiheadAttention with heads chosen by every input; without a gate it is equal to it.
/// Example: auto [y, w] = mha->forward(x, x, x, padding, /*need_weights=*/false); Parameters:
/// in_proj_weight [3E, D] (or q_proj_weight [E, D], k_proj_weight [E, Dk], v_proj_weight [E, Dv]),
/// in_proj_bias [3E], out_proj.weight [D, E], out_proj.bias [D], bias_k and bias_v [1, 1, E],
/// gate.*; E = num_heads * head_dim.
class HEADWISE_API MultiheadAttentionImpl : public torch::nn::Module {
 public:
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(MultiheadAttentionOptions(embed_dim, num_heads)) {}
  /// @throws c10::ValueError for sizes that are not positive or a head count that does not divide
  ///         embed_dim (if head_dim is not given).
  explicit MultiheadAttentionImpl(MultiheadAttentionOptions options);

  /// @param query            [L, B, D], [B, L, D] with batch_first, or [L, D] unbatched
  /// @param key              the same with S rows of kdim features
  /// @param value            the same with S rows of vdim features
  /// @param key_padding_mask bool (true = padding) or floating [B, S]; undefined: none
  /// @param attn_mask        bool (true = may not attend) or floating [L, S] or [B * H, L, S]
  /// @param is_causal        a hint that attn_mask is the causal mask
  /// @return {output, shaped as query; weights [B, L, S'] averaged over heads or [B, H, L, S'],
  /// zeros
  ///         for heads that did not run, undefined without need_weights}
  std::tuple<at::Tensor, at::Tensor> forward(
      const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
      const at::Tensor& key_padding_mask = {}, bool need_weights = true,
      const at::Tensor& attn_mask = {}, bool average_attn_weights = true, bool is_causal = false);

  /// Initialises the parameters again, except out_proj.weight, as torch.nn.MultiheadAttention does.
  void reset_parameters();
  /// Resets every parameter, including those of out_proj and of the gate.
  void reset();
  /// Its sizes, and the options that are not their defaults.
  void pretty_print(std::ostream& stream) const override;
  /// A copy with its own tensors and gate; observers are not copied.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  /// Puts a gate of these options into the layer, bound to its sizes.
  void set_gate(const GateOptions& gate_options);

  int64_t head_dim() const { return head_dim_; }

  MultiheadAttentionOptions options;
  at::Tensor in_proj_weight, in_proj_bias, q_proj_weight, k_proj_weight, v_proj_weight;
  at::Tensor bias_k, bias_v;
  torch::nn::Linear out_proj{nullptr};
  std::shared_ptr<GateImpl> gate;
  /// Called with the gate's choice in each forward, by the thread that runs it. The layer keeps no
  /// state of a call, so threads may evaluate one layer at the same time; the function must then be
  /// thread-safe, and be set before they start.
  std::function<void(const Selection&)> on_selection;
  /// Called in each forward, where it is set, in the same way; projecting every head for it costs
  /// time.
  std::function<void(const AttentionProbe&)> probe;
  /// Whether probe also receives the heads' outputs. Every head then runs, also those that the gate
  /// did not choose, and the output is computed from them.
  bool probe_context = false;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(at::Tensor())}, {4, torch::nn::AnyValue(true)},
                           {5, torch::nn::AnyValue(at::Tensor())}, {6, torch::nn::AnyValue(true)},
                           {7, torch::nn::AnyValue(false)})

 private:
  void clone_(torch::nn::Module& original, const std::optional<torch::Device>& device) override;
  ProjectionWeights projections() const;

  int64_t head_dim_;
  bool same_embed_dim_;
};
TORCH_MODULE(MultiheadAttention);

}  // namespace headwise

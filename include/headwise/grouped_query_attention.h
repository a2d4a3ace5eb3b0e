// Attention of decoders: grouped key/value heads, rotary positions, a cache, chosen heads.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headwise/attention.h"
#include "headwise/export.h"
#include "headwise/gates.h"
#include "headwise/key_value_cache.h"

namespace headwise {

/// Options of GroupedQueryAttention, as in Python.
/// Example: GroupedQueryAttentionOptions(576, 9).num_key_value_heads(3).gate(BudgetGateOptions())
struct HEADWISE_API GroupedQueryAttentionOptions {
  GroupedQueryAttentionOptions(int64_t embed_dim, int64_t num_heads)
      : embed_dim_(embed_dim), num_heads_(num_heads) {}

  /// Width of the model, D.
  TORCH_ARG(int64_t, embed_dim);
  /// Query heads, H.
  TORCH_ARG(int64_t, num_heads);
  /// Key/value heads, Hkv; divides H. Default: H.
  TORCH_ARG(std::optional<int64_t>, num_key_value_heads) = std::nullopt;
  /// Width of a head, d; default embed_dim / num_heads.
  TORCH_ARG(std::optional<int64_t>, head_dim) = std::nullopt;
  /// Dropout probability on the attention probabilities.
  TORCH_ARG(double, dropout) = 0.0;
  /// Whether the query, key and value projections have a bias.
  TORCH_ARG(bool, bias) = false;
  /// Whether the output projection has one; default: as bias.
  TORCH_ARG(std::optional<bool>, output_bias) = std::nullopt;
  /// Of the scores; default head_dim ** -0.5.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  /// Epsilon of an RMS norm over each head of the queries and keys, before they are rotated
  /// (Qwen3); default: no norm.
  TORCH_ARG(std::optional<double>, qk_norm_eps) = std::nullopt;
  /// In causal calls a query sees this many of the last keys, its own among them; default: all.
  TORCH_ARG(std::optional<int64_t>, sliding_window) = std::nullopt;
  /// The key/value head of each query head, ascending, if groups differ in size (a pruned layer);
  /// default: groups of H / Hkv.
  TORCH_ARG(std::optional<std::vector<int64_t>>, key_value_heads) = std::nullopt;
  /// With a cache: choose once, when it is empty (the prompt), and keep that choice for all later
  /// steps. Keys and values that no chosen head reads are then not computed, and the cache holds
  /// only the key/value heads of the sequence in the batch that reads the most.
  TORCH_ARG(bool, keep_selection) = false;
  /// Device of the parameters.
  TORCH_ARG(std::optional<at::Device>, device) = std::nullopt;
  /// Type of the parameters.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = std::nullopt;
  /// The gate; none: every head runs. It must not read queries and keys (ThresholdGate).
  TORCH_ARG(std::optional<GateOptions>, gate) = std::nullopt;
};

/// A call of GroupedQueryAttention besides its input. Undefined tensors: none. S is L, the tokens
/// of the call, or with a cache all tokens that it holds after it; in cross-attention the length of
/// `memory`.
struct GroupedQueryArguments {
  /// Rotary embedding (Su et al. 2021, arXiv 2104.09864), both [B or 1, L, r]: the first r features
  /// of each head of the queries and keys turn, feature i with feature i + r / 2.
  at::Tensor cos = {}, sin = {};
  /// [B, S]; bool (true = padding) or floating (added to the scores).
  at::Tensor key_padding_mask = {};
  /// bool [B, L]: which tokens of the call are padding, for the gate; default: the last L columns
  /// of key_padding_mask, in cross-attention none.
  at::Tensor query_padding_mask = {};
  /// Broadcastable to [B, H, L, S]; bool (true = may not attend) or floating (added to scores).
  at::Tensor attn_mask = {};
  /// A query sees the keys up to its own, the last query being at the last key.
  bool is_causal = true;
  /// Stores the call's keys and values and gives those of all tokens; in cross-attention those of
  /// `memory`, computed in the first call only. Not owned.
  KeyValueCache* cache = nullptr;
  at::Tensor memory = {};     ///< [B, S, D]: cross-attention, with is_causal false
  bool need_weights = false;  ///< also return the probabilities
};

/// Causal self-attention in which groups of query heads share keys and values (Ainslie et al. 2023,
/// arXiv 2305.13245), with *query* heads chosen by every input, and in decoding at every step.
/// Example: auto [y, w] = layer->forward(x, {.cos = cos, .sin = sin, .cache = &cache});
/// Parameters: q_proj.weight [H d, D], k_proj.weight and v_proj.weight [Hkv d, D], o_proj.weight
/// [D, H d], their bias, q_norm.weight and k_norm.weight [d] (with qk_norm_eps), gate.*.
class HEADWISE_API GroupedQueryAttentionImpl : public torch::nn::Module {
 public:
  GroupedQueryAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : GroupedQueryAttentionImpl(GroupedQueryAttentionOptions(embed_dim, num_heads)) {}
  /// @throws c10::ValueError for sizes that are not positive, num_key_value_heads that does not
  ///         divide num_heads, or key_value_heads that leave one out
  explicit GroupedQueryAttentionImpl(GroupedQueryAttentionOptions options);

  /// @param x [B, L, D]
  /// @return {output [B, L, D]; probabilities before dropout [B, H, L, S], zeros for heads that did
  ///         not run, undefined without need_weights}
  /// @throws c10::ValueError for a shape that does not fit, c10::TypeError for a mask of another
  ///         dtype; the cache is then unchanged
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x,
                                             const GroupedQueryArguments& arguments = {});

  /// Resets every parameter, those of the gate among them.
  void reset();
  /// Its sizes, and the options that are not their defaults.
  void pretty_print(std::ostream& stream) const override;
  /// A copy with its own tensors and gate; observers are not copied.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  /// Puts a gate of these options into the layer, bound to its sizes and groups.
  /// @throws c10::ValueError for a gate that reads queries and keys
  void set_gate(const GateOptions& gate_options);

  /// Takes the bias of a projection away: attention of other libraries may have biases only in
  /// some.
  /// @param projection "q_proj", "k_proj", "v_proj" or "o_proj"
  void drop_bias(const std::string& projection);

  int64_t num_key_value_heads() const { return groups_; }
  int64_t head_dim() const { return head_dim_; }
  double scale() const { return scale_; }
  /// The key/value head of each query head, ascending [H].
  std::vector<int64_t> head_groups() const;

  GroupedQueryAttentionOptions options;
  torch::nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, o_proj{nullptr};
  at::Tensor q_norm, k_norm;  ///< [d], or undefined
  std::shared_ptr<GateImpl> gate;
  /// Called with the gate's (or the cache's) choice in each forward, by the thread that runs it.
  std::function<void(const Selection&)> on_selection;
  /// Tokens that the gate sees: see gates_see.
  at::Tensor seen;

 private:
  void clone_(torch::nn::Module& original, const std::optional<torch::Device>& device) override;
  void check_call(const at::Tensor& x, const GroupedQueryArguments& arguments) const;
  std::optional<Selection> groups_read(const Selection* chosen, bool cached) const;
  at::Tensor project(const torch::nn::Linear& linear, const at::Tensor& x, int64_t num_heads,
                     const at::Tensor& norm, const Selection* chosen) const;
  at::Tensor for_each_head(const at::Tensor& shared) const;
  at::Tensor attend_every(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const AttentionArguments& masks) const;
  at::Tensor attend_chosen(at::Tensor q, at::Tensor k, at::Tensor v, const Selection& chosen,
                           AttentionArguments masks, const at::Tensor& slots) const;

  int64_t groups_, head_dim_;
  double scale_;
};
TORCH_MODULE(GroupedQueryAttention);

/// Layers of this kind by name, in the order of the model.
using GroupedLayers = std::vector<std::pair<std::string, GroupedQueryAttention>>;

/// Every GroupedQueryAttention within `model`, by its qualified name. The layers are the model's
/// own, not copies.
HEADWISE_API GroupedLayers grouped_layers(torch::nn::Module& model);

/// Limits what gates see, during its lifetime; gates_see makes it.
class HEADWISE_API GatesSee {
 public:
  GatesSee(GroupedLayers layers, const at::Tensor& tokens);
  ~GatesSee();
  GatesSee(const GatesSee&) = delete;
  GatesSee& operator=(const GatesSee&) = delete;

 private:
  GroupedLayers layers_;
  std::vector<at::Tensor> before_;
};

/// The gates of these layers see only some tokens for as long as the result lives, in every call,
/// by any thread. Training a causal model on whole sequences needs it: a gate that pools all tokens
/// leaks later ones to every position, through the choice of heads.
/// Example: const auto limited = gates_see(grouped_layers(*model), labels == -100);
/// @param tokens bool [B, L], true = seen, of the sequences that the layers are called with
/// @throws c10::ValueError for another shape, or no layers; c10::TypeError for another dtype
HEADWISE_API GatesSee gates_see(GroupedLayers layers, const at::Tensor& tokens);
/// The same for the first `tokens` that are not padding. @throws c10::ValueError if not positive
HEADWISE_API GatesSee gates_see(GroupedLayers layers, int64_t tokens);

}  // namespace headwise

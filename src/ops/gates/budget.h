// Operators of the budget gate; torch.ops.headwise has them by the same names.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace headwise {

/// Weights in (0, 1) that sum to `mass` in every row: m = sigmoid((scores - t) / temperature), with
/// t solved row by row. Differentiable in scores and mass (implicit function). scores [B, H], mass
/// [B], temperature [] -> [B, H]. A mass of H or more gives ones.
at::Tensor soft_top_k(const at::Tensor& scores, const at::Tensor& mass,
                      const at::Tensor& temperature);

/// The features of an input that gates see: the mean of x [B, L, D] over rows that are not padding,
/// in at least float32 and cut off from the graph (the gate's gradient does not disturb the model)
/// -> [B, D].
at::Tensor gate_features(const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask);

/// base [H] + weight [H, D] features [B, D] / sqrt(D) -> [B, H]; in training the second term is
/// held at zero until `progress` [] reaches `static_until`.
at::Tensor input_relevance(const at::Tensor& features, const at::Tensor& base,
                           const at::Tensor& weight, const at::Tensor& progress, bool training,
                           double static_until);

/// {count, sum, sum of squares} of features [B, D] over B -> float64 [2 D + 1]: those of several
/// batches can be added.
at::Tensor feature_moments(const at::Tensor& features);

/// Updates mean [D], variance [D] and batches [] with the moments of one more batch: a plain
/// average over the first 50 batches, an exponential one after. A batch that is empty or not finite
/// changes nothing, nor does a forward that is repeated inside a backward (activation
/// checkpointing).
void update_statistics(const at::Tensor& moments, const at::Tensor& mean,
                       const at::Tensor& variance, const at::Tensor& batches);

/// (features [B, D] - mean [D]) / sqrt(variance [D] + 1e-4). Over inputs, not over D: the mean of a
/// layer's input is dominated by a vector that all inputs share, and a gate that depends on that is
/// static in effect.
at::Tensor standardize(const at::Tensor& features, const at::Tensor& mean,
                       const at::Tensor& variance);

/// gate_features() of x [B, L, D], learnt by update_statistics() and standardised with what was
/// learnt -> [B, D]. `learn_features_composed` is the same by these operators, for other devices.
at::Tensor learn_features(const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask,
                          at::Tensor mean, at::Tensor variance, at::Tensor batches);
at::Tensor learn_features_composed(const at::Tensor& x,
                                   const std::optional<at::Tensor>& key_padding_mask,
                                   at::Tensor mean, at::Tensor variance, at::Tensor batches);

/// Initial relevance of gates, from the importance of all heads of a model [heads]: sharpness *
/// (rank - (1 - keep)), rank in [0, 1]; the most important share `keep` is positive -> [heads].
at::Tensor importance_start(const at::Tensor& importance, double keep, double sharpness);

/// The same for the layers of a model, from one score per head: {relevance of each [H], share of
/// its heads that is positive}.
/// @throws c10::ValueError naming the layer, if a score is not finite or not of shape [H]
std::tuple<std::vector<at::Tensor>, std::vector<double>> gate_starts(
    at::TensorList importance, const std::vector<std::string>& layers, at::IntArrayRef num_heads,
    double keep, double sharpness);

/// base [H] for every sequence of x [B, L, D], in at least float32 -> [B, H].
at::Tensor static_relevance(const at::Tensor& base, const at::Tensor& x);

/// {budget, asked}, each [B]: asked = sigmoid of a two-layer network of the features, and the same
/// held in [min_budget, max_budget]. Until `progress` reaches `warmup` the logit is raised, so that
/// training starts at `initial_keep` and comes down to the network's own answer.
std::tuple<at::Tensor, at::Tensor> head_budget(
    const at::Tensor& features, const at::Tensor& hidden_weight, const at::Tensor& hidden_bias,
    const at::Tensor& out_weight, const at::Tensor& out_bias, const at::Tensor& progress,
    bool training, double min_budget, double max_budget, double keep, double initial_keep,
    double warmup, double static_until);

/// {index, count, weight, expected_heads} from relevance [B, H] and budget [B]. Evaluation: the
/// `count` most relevant heads. Training: soft_top_k under annealed noise and temperature, and from
/// `progress` = hard_from on (with straight_through: always) evaluation's selection and weights,
/// with the gradient of the soft ones. run_all: every head runs in training.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> budget_select(
    const at::Tensor& relevance, const at::Tensor& budget, const at::Tensor& progress,
    const std::optional<at::Tensor>& noise, bool training, bool run_all, double temperature,
    double final_temperature, double noise_scale, double hard_from, bool straight_through,
    bool soft_weight, int64_t min_heads, std::string_view rounding);

/// Uniform numbers in [0, 1] to standard Gumbel noise.
at::Tensor gumbel_noise(const at::Tensor& uniform);

/// Entropy of softmax(relevance [B, H]), divided by ln H, mean over B -> [].
at::Tensor relevance_entropy(const at::Tensor& relevance);

/// Mean square of how far `asked` [B] lies outside [min_budget, max_budget] -> [].
at::Tensor budget_bounds(const at::Tensor& asked, double min_budget, double max_budget);

/// input_relevance of the standardised features of x [B, L, D], in evaluation: one pass over x if
/// no gradient is needed (src/ops/budget_gate.cpp) -> [B, H].
at::Tensor evaluate_relevance(const at::Tensor& x,
                              const std::optional<at::Tensor>& key_padding_mask,
                              const at::Tensor& mean, const at::Tensor& variance,
                              const at::Tensor& base, const at::Tensor& weight,
                              const at::Tensor& progress);

/// {index, count, weight, relevance, budget} of a BudgetGate in evaluation with weights of one, as
/// one operator (src/ops/budget_gate.cpp). Without the four tensors of the network every
/// sequence has `budget`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> evaluate_budget_gate(
    const at::Tensor& x, const std::optional<at::Tensor>& key_padding_mask, const at::Tensor& mean,
    const at::Tensor& variance, const at::Tensor& base, const at::Tensor& relevance_weight,
    const std::optional<at::Tensor>& hidden_weight, const std::optional<at::Tensor>& hidden_bias,
    const std::optional<at::Tensor>& out_weight, const std::optional<at::Tensor>& out_bias,
    const at::Tensor& progress, double budget, double min_budget, double max_budget, double keep,
    double initial_keep, double warmup, int64_t min_heads, std::string_view rounding);

}  // namespace headwise

// Importance: one score per head, accumulated over a data set.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "headwise/export.h"

namespace headwise {

/// One score per head, layer by layer; layers may have different numbers of heads.
struct HeadScores {
  std::string metric;                       ///< what the scores measure: "michel", "entropy", ...
  std::vector<std::string> layers;          ///< names, in the order of the model
  std::vector<std::vector<double>> values;  ///< values[layer][head]

  /// JSON: {"format": "headwise.scores", "version": 1, "metric": ..., "layers": [{"name",
  /// "values"}]}.
  HEADWISE_API std::string to_json() const;
  /// @throws c10::ValueError naming what is missing, unknown or not finite.
  HEADWISE_API static HeadScores from_json(const std::string& text);
};

/// The level of the absolute value in I_h = E |<context_h, dL/dcontext_h>| (Michel et al. 2019, eq.
/// 2). It changes the result: see docs/importance.md.
enum class AbsoluteValue {
  per_token,    ///< sum over tokens of |s_t|, divided by the number of tokens (the authors' code)
  per_example,  ///< sum over examples of |sum_t s_t|, divided by the number of examples (eq. 2)
  per_batch,    ///< sum over batches of |sum s|, divided by examples; depends on the batch size
};

/// Accumulates, in float64 and in one pass, the sums of every metric. Not safe for concurrent
/// calls; use one for each thread or process and merge() them.
class HEADWISE_API HeadScoreAccumulator {
 public:
  HeadScoreAccumulator();
  ~HeadScoreAccumulator();
  HeadScoreAccumulator(HeadScoreAccumulator&&) noexcept;
  HeadScoreAccumulator& operator=(HeadScoreAccumulator&&) noexcept;

  /// One batch of one layer's heads.
  /// @param context  floating [B, H, L, d]: each head's output, before the output projection
  /// @param gradient floating [B, H, L, d]: dL/dcontext, L being the sum of the examples' losses
  /// @param query_padding_mask bool [B, L], true = padding: those tokens are left out
  /// @throws c10::ValueError on wrong shapes, another head count than before, non-finite values.
  void add_gradient(const std::string& layer, const at::Tensor& context, const at::Tensor& gradient,
                    const std::optional<at::Tensor>& query_padding_mask = {});

  /// One batch of one layer's attention statistics (attention.h).
  /// @param entropy, confidence floating [B, H]
  void add_statistics(const std::string& layer, const at::Tensor& entropy,
                      const at::Tensor& confidence);

  /// Adds the sums of another accumulator on other data.
  void merge(const HeadScoreAccumulator& other);

  /// Michel et al. 2019. `normalize` divides each layer's scores by their L2 norm (plus 1e-20), as
  /// the paper does.
  /// @throws c10::ValueError if nothing was accumulated, or every score is zero.
  HeadScores michel(AbsoluteValue absolute = AbsoluteValue::per_token, bool normalize = true) const;

  /// Mean normalised attention entropy, in [0, 1]: high means broad attention.
  HeadScores entropy() const;

  /// Mean of the largest attention probability (Voita et al. 2019): high means focused.
  HeadScores attention_confidence() const;

 private:
  struct Layer {
    int64_t heads = 0;
    std::vector<double> per_token, per_example, per_batch, entropy, confidence;
    double tokens = 0, examples = 0, statistics = 0;
  };
  Layer& layer(const std::string& name, int64_t heads);
  template <typename Value>
  HeadScores collect(const std::string& metric, Value value) const;

  std::vector<std::string> order_;
  std::map<std::string, Layer> layers_;
};

/// The heads that are ranked or scaled together: those of each layer, or all heads of the model.
enum class Scope { layer, model };

/// Head importance and entropy score (arXiv 2510.13832): alpha * importance + (1 - alpha) *
/// (1 - entropy), both scaled by min-max over `scope` first.
/// @param importance per-example importance (HeadScoreAccumulator::michel, per_example)
/// @param alpha in [0, 1]
/// @throws c10::ValueError when alpha is out of range or the layers of the two differ.
HEADWISE_API HeadScores hies(const HeadScores& importance, const HeadScores& entropy,
                             double alpha = 0.5, Scope scope = Scope::model);

}  // namespace headwise

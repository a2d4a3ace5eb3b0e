#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "headwise/analysis.h"
#include "headwise/confidence.h"
#include "ops/gates/selection_ops.h"
#include "shown.h"

namespace headwise {

at::Tensor prediction_confidence(const at::Tensor& logits, std::string_view measure) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 2,
                    "logits must be [B, C] of at least 2 classes, got ", logits.sizes());
  const at::Tensor logs = logits.log_softmax(1);  // [B, C]
  if (measure == "probability") return logs.amax(1).exp();
  if (measure == "margin") {
    const at::Tensor two = std::get<0>(logs.exp().topk(2, 1));
    return two.select(1, 0) - two.select(1, 1);
  }
  TORCH_CHECK_VALUE(measure == "entropy",
                    "measure must be 'probability', 'margin' or 'entropy', got ",
                    shown(measure, 100, '\''));
  // A class of probability 0 adds nothing, though its logarithm is minus infinity.
  const at::Tensor p = logs.exp();
  const at::Tensor entropy = -(p * logs.masked_fill(p.eq(0), 0)).sum(1);
  return (1 - entropy / std::log(static_cast<double>(logits.size(1)))).clamp(0, 1);
}

namespace {

/// On the CPU, in double. @throws c10::ValueError
at::Tensor checked_confidence(const at::Tensor& confidence, int64_t stages, int64_t examples) {
  TORCH_CHECK_VALUE(
      confidence.dim() == 2 && confidence.size(0) == stages - 1 && confidence.size(1) == examples,
      "confidence must be [S - 1, N] = [", stages - 1, ", ", examples, "], got ",
      confidence.sizes());
  const auto sure = confidence.detach().to(at::kCPU, at::kDouble).contiguous();
  TORCH_CHECK_VALUE(at::isfinite(sure).all().item<bool>(),
                    "confidence must be finite, got NaN or infinity");
  return sure;
}

/// The thresholds that tell examples apart, infinity last.
std::vector<double> ascending(const at::Tensor& sure) {
  std::vector<double> found(sure.const_data_ptr<double>(),
                            sure.const_data_ptr<double>() + sure.numel());
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  found.push_back(std::numeric_limits<double>::infinity());
  return found;
}

/// Thresholds that do not depend on the data, so that testing them one after the other, from the
/// last, needs no correction for their number: denser towards 0 and 1, then infinity.
std::vector<double> fixed_thresholds() {
  constexpr int kSteps = 2000;
  constexpr double kReach = 20;  // in logits
  std::vector<double> found{0.0};
  for (int i = 0; i <= kSteps; ++i) {
    found.push_back(1 / (1 + std::exp(kReach - 2 * kReach * i / kSteps)));
  }
  found.push_back(std::numeric_limits<double>::infinity());
  return found;
}

}  // namespace

double confidence_threshold(const at::Tensor& confidence, const at::Tensor& cost, double limit) {
  TORCH_CHECK_VALUE(cost.dim() == 2 && cost.size(0) >= 1 && cost.size(1) >= 1,
                    "cost must be [S, N] of at least one stage and example, got ", cost.sizes());
  const auto sure = checked_confidence(confidence, cost.size(0), cost.size(1));
  const auto price = cost.detach().to(at::kCPU, at::kDouble).contiguous();
  TORCH_CHECK_VALUE(at::isfinite(price).all().item<bool>(),
                    "cost must be finite, got NaN or infinity");
  TORCH_CHECK_VALUE(price.ge(0).all().item<bool>(), "cost must not be negative");
  const auto c = sure.accessor<double, 2>(), p = price.accessor<double, 2>();
  const int64_t stages = price.size(0), examples = price.size(1);

  const auto mean_cost = [&](double threshold) {
    double sum = 0;
    for (int64_t n = 0; n < examples; ++n) {
      for (int64_t s = 0; s < stages; ++s) {
        sum += p[s][n];
        if (s + 1 < stages && c[s][n] >= threshold) break;
      }
    }
    return sum / static_cast<double>(examples);
  };

  const auto candidates = ascending(sure);
  const double least = mean_cost(candidates.front());
  TORCH_CHECK_VALUE(least <= limit, "limit must be at least ", least,
                    ", what the first stage costs, got ", limit);
  // The first candidate that costs too much; the one before is the answer.
  const auto over = std::partition_point(candidates.begin(), candidates.end(),
                                         [&](double t) { return mean_cost(t) <= limit; });
  return *std::prev(over);
}

double binomial_tail(int64_t successes, int64_t trials, double probability) {
  constexpr int64_t kMostTrials = 10'000'000;  // each is a term of the sum
  TORCH_CHECK_VALUE(trials >= 0 && trials <= kMostTrials, "trials must be in 0..", kMostTrials,
                    ", got ", trials);
  TORCH_CHECK_VALUE(probability >= 0 && probability <= 1, "probability must be in [0, 1], got ",
                    probability);
  if (successes >= trials) return 1.0;
  if (successes < 0 || probability == 1.0) return 0.0;
  if (probability == 0.0) return 1.0;
  const auto n = static_cast<double>(trials);
  const double log_p = std::log(probability), log_q = std::log1p(-probability);
  double sum = 0;
  for (int64_t i = 0; i <= successes; ++i) {
    const auto k = static_cast<double>(i);
    const double ways = std::lgamma(n + 1) - std::lgamma(k + 1) - std::lgamma(n - k + 1);
    sum += std::exp(ways + k * log_p + (n - k) * log_q);
  }
  return std::min(sum, 1.0);
}

double accurate_threshold(const at::Tensor& confidence, const at::Tensor& correct, double loss,
                          std::optional<double> certainty) {
  TORCH_CHECK_VALUE(correct.dim() == 2 && correct.size(0) >= 1 && correct.size(1) >= 1,
                    "correct must be [S, N] of at least one stage and example, got ",
                    correct.sizes());
  TORCH_CHECK_VALUE(loss >= 0 && loss <= 1, "loss must be in [0, 1], got ", loss);
  TORCH_CHECK_VALUE(!certainty || (*certainty > 0 && *certainty < 1),
                    "certainty must be in (0, 1), got ", certainty.value_or(0.0));
  const int64_t stages = correct.size(0), examples = correct.size(1);
  const auto sure = checked_confidence(confidence, stages, examples);
  const auto right = correct.detach().to(at::kCPU, at::kDouble).contiguous();
  const auto c = sure.accessor<double, 2>(), r = right.accessor<double, 2>();
  /// How many examples only the widest stage gets right, and how many only the policy does.
  const auto changes = [&](double threshold) {
    std::pair<int64_t, int64_t> found{0, 0};
    for (int64_t n = 0; n < examples; ++n) {
      int64_t s = 0;
      while (s + 1 < stages && c[s][n] < threshold) ++s;
      found.first += r[stages - 1][n] > r[s][n];
      found.second += r[stages - 1][n] < r[s][n];
    }
    return found;
  };
  const auto loses_no_more = [&](double threshold) {
    const auto [lost, won] = changes(threshold);
    if (certainty) return binomial_tail(lost, examples, loss) <= 1 - *certainty;
    return static_cast<double>(lost - won) <= loss * static_cast<double>(examples);
  };
  const auto candidates = certainty ? fixed_thresholds() : ascending(sure);
  auto kept = std::prev(candidates.end());  // infinity loses nothing
  while (kept != candidates.begin() && loses_no_more(*std::prev(kept))) --kept;
  return *kept;
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> widened(const at::Tensor& weight,
                                                       const at::Tensor& count,
                                                       const at::Tensor& relevance, double factor) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && relevance.sizes() == weight.sizes() && count.dim() == 1 &&
                        count.size(0) == weight.size(0),
                    "weight and relevance must be [B, H] and count [B], got ", weight.sizes(), ", ",
                    relevance.sizes(), " and ", count.sizes());
  TORCH_CHECK_VALUE(factor > 0.0 && std::isfinite(factor), "factor must be positive and finite, ",
                    "got ", factor);
  const int64_t heads = weight.size(1);
  const at::Tensor share = count.to(at::kFloat) * (factor / static_cast<double>(heads));  // [B]
  const at::Tensor wider = budget_count(share, heads, 1, "round").masked_fill(count.eq(0), 0);
  const at::Tensor index = select_heads(relevance.to(at::kFloat), wider);  // [B, H]
  const at::Tensor chosen = selection_mask(index, wider, weight.scalar_type());
  const at::Tensor own = at::where(weight.eq(0), at::ones_like(weight), weight);
  return {index, wider, own * chosen};
}

}  // namespace

Selection widen_selection(const Selection& selection, const at::Tensor& relevance, double factor) {
  Selection wider = selection;
  if (selection.weight.size(1) == 0) return wider;
  std::tie(wider.index, wider.count, wider.weight) =
      widened(selection.weight, selection.count, relevance, factor);
  return wider;
}

at::Tensor stopping_stage(const at::Tensor& confidence, double threshold) {
  TORCH_CHECK_VALUE(confidence.dim() == 2 && confidence.size(0) >= 1,
                    "confidence must be [S, N] of at least one stage, got ", confidence.sizes());
  at::Tensor sure = confidence.ge(threshold);
  sure.select(0, -1).fill_(true);
  return sure.to(at::kInt).argmax(0);
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("binomial_tail", binomial_tail);
  m.impl("widen_selection", widened);
  m.impl("stopping_stage", stopping_stage);
  m.impl("prediction_confidence", [](const at::Tensor& logits, c10::string_view measure) {
    return prediction_confidence(logits, std::string_view(measure.data(), measure.size()));
  });
}

TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("confidence_threshold", confidence_threshold);
  m.impl("accurate_threshold", accurate_threshold);
}

}  // namespace headwise

// The module of SleepGate; its formulas are in sleep.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>

#include "gates/helpers.h"
#include "gates/scope.h"
#include "headwise/gates.h"
#include "ops/gates/budget.h"
#include "ops/gates/selection_ops.h"
#include "ops/gates/sleep.h"

namespace headwise {

SleepGateImpl::SleepGateImpl(SleepGateOptions options_, int64_t embed_dim, int64_t num_heads,
                             const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads, tensor_options), options(std::move(options_)) {
  awake = register_buffer("awake", torch::ones({num_heads}, tensor_options));
  score = register_buffer("score", torch::zeros({num_heads}, tensor_options.dtype(at::kFloat)));
  steps = register_buffer("steps", torch::zeros({}, tensor_options.dtype(at::kLong)));
  set_scope(options.scope(), options);
}

void SleepGateImpl::reset_parameters() {
  progress.zero_();
  awake.fill_(1.0);
  score.zero_();
  steps.zero_();
}

void SleepGateImpl::reset() {
  ScopedGateImpl::reset();
  if (linked() != nullptr) set_moves({});
}

void SleepGateImpl::start(const at::Tensor& relevance, double) { awake.copy_(relevance.gt(0)); }

void SleepGateImpl::contribute(GateScope& scope) const {
  scope.scores.push_back(score);
  scope.awake.push_back(awake);
  scope.steps.push_back(steps);
  scope.weights.emplace_back();
}

std::vector<HeadMove> SleepGateImpl::moves() const {
  std::vector<HeadMove> own;
  if (const auto* shared = linked()) {
    std::copy_if(shared->moves.begin(), shared->moves.end(), std::back_inserter(own),
                 [&](const HeadMove& move) { return move.position == position(); });
  }
  return own;
}

void SleepGateImpl::set_moves(const std::vector<HeadMove>& moves) {
  auto& all = scope().moves;
  std::erase_if(all, [&](const HeadMove& move) { return move.position == position(); });
  for (HeadMove move : moves) {
    move.position = position();
    all.push_back(move);
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const HeadMove& a, const HeadMove& b) { return a.step < b.step; });
}

// Once per training forward of the model: updates the scores with the last one's gradients and,
// every few steps, lets heads move.
void SleepGateImpl::advance() {
  torch::NoGradGuard no_grad;
  auto& scope = this->scope();
  for (size_t i = 0; i < scope.weights.size(); ++i) {
    auto& weight = scope.weights[i];
    if (weight.defined() && weight.grad().defined()) {
      const bool first = !scope.scores[i].ne(0).any().item<bool>();
      scope.scores[i].copy_(
          update_head_score(scope.scores[i], weight.grad(), options.decay(), first));
    }
    weight = at::Tensor();
  }
  const int64_t step = steps.item<int64_t>();
  for (auto& counter : scope.steps) counter.add_(1);
  const double now = progress.item<double>();
  if (step == 0 || step % options.every() != 0 || now >= options.settled_from()) {
    return;
  }
  const auto before = at::cat(scope.awake);  // [N]
  const auto scores = at::cat(scope.scores);
  if (scores.numel() > 0 && !scores.any().item<bool>()) {
    TORCH_WARN("no head of SleepGate has a score, so none moves: no finite gradient has reached ",
               "the gates");
    return;
  }
  const int64_t heads = before.size(0);
  const double ramp = options.asleep_by() > 0.0 ? std::min(1.0, now / options.asleep_by()) : 1.0;
  const double share = 1.0 - (1.0 - options.keep()) * ramp;
  const auto rounded = static_cast<int64_t>(std::floor(share * static_cast<double>(heads) + 0.5));
  const auto after =
      awake_heads(scores, before, std::clamp<int64_t>(rounded, std::min<int64_t>(1, heads), heads),
                  options.margin());
  int64_t start = 0;
  for (size_t i = 0; i < scope.awake.size(); ++i) {
    for (int64_t head = 0; head < scope.awake[i].size(0); ++head) {
      const auto at = start + head;
      const bool was = before[at].item<double>() != 0.0, is = after[at].item<double>() != 0.0;
      if (was != is) {
        scope.moves.push_back(
            {step, now, static_cast<int64_t>(i), head, is, scores[at].item<double>()});
      }
    }
    scope.awake[i].copy_(after.narrow(0, start, scope.awake[i].size(0)));
    start += scope.awake[i].size(0);
  }
}

Selection SleepGateImpl::forward(const at::Tensor& x, const at::Tensor&) {
  check_input(x);
  auto& shared = scope();
  const bool training = is_training();
  if (records() && x.size(0) > 0 && shared.begins(position())) advance();
  // A leaf: after the backward its gradient is the worth of each head to each sequence.
  Replay::Used used{{awake},
                    at::GradMode::is_enabled(),
                    run_all() || steps.item<int64_t>() % options.probe_every() == 0};
  bool read = true;
  if (records() && may_be_recomputed()) {
    replay_->remember(x, {{awake.clone(), steps.clone()}, used.differentiable, used.flag});
  } else if (training && recomputing()) {
    if (const auto* before = replay_->recall(x)) {
      used = *before;
      // Without a graph in the first forward this one's gradient is read, as long as no later
      // forward has taken its place.
      read = !used.differentiable && used.tensors[1].equal(steps);
    }
  }
  auto weight = used.tensors[0].detach().to(x.scalar_type()).expand({x.size(0), -1});  // [B, H]
  auto [index, count] = select_nonzero(weight);
  const auto relevance = static_relevance(score, x);
  if (!training) {
    return {index, count, weight, relevance, {}};
  }
  const bool all = used.flag;
  weight = weight.clone().requires_grad_(all && at::GradMode::is_enabled());
  if (all) {
    if (read) shared.weights[position()] = weight;
    auto every = select_all(x.size(0), num_heads(), weight.options().requires_grad(false));
    index = every.index;
    count = every.count;
  }
  if (records()) expected_heads = weight.detach().sum(1);
  return {index, count, weight, relevance, {}};
}

}  // namespace headwise

// State of gates that decide together.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "headwise/gates.h"
#include "recomputation.h"

namespace headwise {

/// The gates of one model that decide as one, in the model's order. It holds their tensors, not the
/// gates: a gate that has been removed from the model still counts until link_gates is called
/// again.
struct GateScope {
  /// What each gate scores its heads with [H]; one after the other they are the model's [N].
  std::vector<at::Tensor> scores;
  /// RequestedBudgetGate: how the scores move with the budget [H].
  std::vector<at::Tensor> tilts;
  /// SleepGate: which heads are awake, 1 or 0 [H]; the training forwards so far []; the weights of
  /// the last one [B, H]; and what moved.
  std::vector<at::Tensor> awake, steps, weights;
  std::vector<HeadMove> moves;

  int64_t num_heads() const {
    int64_t total = 0;
    for (const auto& part : scores) total += part.size(0);
    return total;
  }

  /// Where the heads of the gate at `position` begin among the model's.
  int64_t start(int64_t position) const {
    int64_t before = 0;
    for (int64_t i = 0; i < position; ++i) before += scores[i].size(0);
    return before;
  }

  /// Whether the gate at `position` begins a training forward of the model: the gate that asks a
  /// second time does, so no gate need know which one comes first.
  bool begins(int64_t position) {
    const bool first = served_.empty() || served_[position];
    if (first) served_.assign(scores.size(), false);
    served_[position] = true;
    return first;
  }

  /// Noise and results that are drawn once per training forward of the model: make(sample()). A
  /// forward that is repeated inside a backward (activation checkpointing) gets the same again; x
  /// is the gate's input.
  using Tensors = std::vector<at::Tensor>;
  Tensors draw(int64_t position, const at::Tensor& x, const std::function<Tensors()>& sample,
               const std::function<Tensors(const Tensors&)>& make) {
    replays_.resize(scores.size());
    auto& replay = replays_[position];
    if (recomputing()) {
      if (const auto* used = replay.recall(x)) return repeat(*used, sample, make);
    }
    const bool first = begins(position);
    if (first) {
      noise_ = sample();
      drawn_ = make(noise_);
    }
    if (may_be_recomputed()) {
      Replay::Used used{noise_, at::GradMode::is_enabled(), first};
      for (const auto& part : drawn_) {
        used.tensors.push_back(part.detach().set_requires_grad(part.requires_grad()));
      }
      replay.remember(x, std::move(used));
    }
    return drawn_;
  }

  /// Whether it knows every gate: the copy of a scope is complete once all its gates are copied.
  bool complete() const {
    return std::all_of(scores.begin(), scores.end(), [](const auto& t) { return t.defined(); });
  }

  /// The scope of the copies of its gates, where the one at `position` has the tensors of `own`.
  /// A model is copied by one thread, gate after gate in its order: each copy joins that of the
  /// gate before it.
  std::shared_ptr<GateScope> copy_at(int64_t position, const GateScope& own) {
    const std::lock_guard lock(copying_);
    auto& begun = copies_[std::this_thread::get_id()];
    auto copy = begun.lock();
    const bool next = copy && position > 0 && copy->scores[position - 1].defined();
    if (!next || copy->scores[position].defined()) {
      begun = copy = std::make_shared<GateScope>();
      for (const auto parts : kParts) (*copy.*parts).resize((this->*parts).size());
      copy->moves = moves;
    }
    for (const auto parts : kParts) {
      if (!(own.*parts).empty()) (*copy.*parts)[position] = (own.*parts)[0];
    }
    if (copy->complete()) copies_.erase(std::this_thread::get_id());
    return copy;
  }

 private:
  static constexpr std::vector<at::Tensor> GateScope::* kParts[] = {
      &GateScope::scores, &GateScope::tilts, &GateScope::awake, &GateScope::steps,
      &GateScope::weights};

  Tensors repeat(const Replay::Used& used, const std::function<Tensors()>& sample,
                 const std::function<Tensors(const Tensors&)>& make) const {
    const auto middle = used.tensors.begin() + static_cast<int64_t>(noise_.size());
    if (used.flag) sample();  // the generator moves on as it did
    // The gate that drew them must repeat the same operators. If the forward had no gradients,
    // every gate repeats them, each for a graph of its own.
    if (used.flag || !used.differentiable) return make({used.tensors.begin(), middle});
    return {middle, used.tensors.end()};
  }

  Tensors noise_, drawn_;
  std::vector<bool> served_;
  std::vector<Replay> replays_;
  std::mutex copying_;
  std::map<std::thread::id, std::weak_ptr<GateScope>> copies_;
};

}  // namespace headwise

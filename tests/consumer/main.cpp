// Uses headwise as a stranger would: its umbrella header, the target headwise::headwise, nothing
// else. A layer that chooses its heads is run, pruned by a plan after a JSON round trip, and the
// pruned layer must match the plan.
#include <cstdlib>
#include <iostream>
#include <string>

#include "headwise/headwise.h"

namespace {

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::cerr << "consumer: " << what << '\n';
  std::exit(1);
}

}  // namespace

int main() {
  torch::NoGradGuard no_grad;
  constexpr int64_t kWidth = 32, kHeads = 4;
  const auto x = torch::randn({2, 5, kWidth});

  auto gated = headwise::MultiheadAttention(headwise::MultiheadAttentionOptions(kWidth, kHeads)
                                                .batch_first(true)
                                                .gate(headwise::BudgetGateOptions().budget(0.5)));
  gated->eval();
  at::Tensor count;
  gated->on_selection = [&](const headwise::Selection& chosen) { count = chosen.count; };
  const auto [y, weights] = gated->forward(x, x, x, {}, /*need_weights=*/false);
  require(y.sizes() == x.sizes() && at::isfinite(y).all().item<bool>(), "no output");
  require(count.eq(2).all().item<bool>(), "half of 4 heads are 2");

  const auto plan = headwise::HeadPlan::from_json(
      headwise::HeadPlan({{"layer", kHeads, {1, 3}, {1.0, 0.5}}}).to_json());
  gated->set_gate(headwise::FixedGateOptions().scale(std::vector<double>{0.0, 1.0, 0.0, 0.5}));
  auto small = headwise::prune(gated, plan.layers().at(0));
  small->eval();
  const auto masked = std::get<0>(gated->forward(x, x, x, {}, false));
  const auto pruned = std::get<0>(small->forward(x, x, x, {}, false));
  require(at::allclose(masked, pruned, 1e-4, 1e-5), "the pruned layer differs from the masked one");

  std::cout << "headwise " << headwise::version() << ", compiled against torch "
            << headwise::compiled_torch_version() << '\n';
}

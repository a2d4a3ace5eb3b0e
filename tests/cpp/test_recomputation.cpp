// Activation checkpointing, as LibTorch users write it: a function whose backward runs the forward
// again. Gates must choose again what they chose, and touch no state twice.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "headwise/gates.h"
#include "headwise/multihead_attention.h"

namespace test_recomputation {

using namespace headwise;
using Run = std::function<at::Tensor(const at::Tensor&)>;

struct Checkpoint : torch::autograd::Function<Checkpoint> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const Run* run) {
    context->saved_data["run"] = reinterpret_cast<int64_t>(run);
    context->save_for_backward({x, at::detail::getDefaultCPUGenerator().get_state()});
    return (*run)(x);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto* run = reinterpret_cast<const Run*>(context->saved_data["run"].toInt());
    auto generator = at::detail::getDefaultCPUGenerator();
    const auto after = generator.get_state();
    generator.set_state(saved[1]);
    const auto x = saved[0].detach().requires_grad_();
    {
      torch::AutoGradMode with_gradients(true);
      torch::autograd::backward({(*run)(x)}, {gradients[0]});
    }
    generator.set_state(after);
    return {x.grad(), at::Tensor()};
  }
};

struct Layers : torch::nn::Module {
  explicit Layers(const GateOptions& gate) {
    for (int i = 0; i < 3; ++i) {
      layers.emplace_back(MultiheadAttentionOptions(16, 4).batch_first(true).gate(gate));
      layers.back()->on_selection = [this, i](const Selection& chosen) {
        last[i] = chosen.index;
        ++told[i];
      };
      register_module("layer" + std::to_string(i), layers.back());
      runs.emplace_back([layer = layers.back()](const at::Tensor& x) mutable {
        return x + std::get<0>(layer->forward(x, x, x, {}, /*need_weights=*/false));
      });
    }
    link_gates(*this);
    torch::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.add_(torch::randn_like(parameter) * 0.3);
  }

  at::Tensor forward(at::Tensor x, bool checkpointed) {
    for (const auto& run : runs) x = checkpointed ? Checkpoint::apply(x, &run) : run(x);
    return x;
  }

  std::vector<MultiheadAttention> layers;
  std::vector<Run> runs;
  std::array<at::Tensor, 3> last;        // what each layer chose in its last forward
  std::array<int64_t, 3> told{0, 0, 0};  // choices that it reported
};

// Gradients, buffers and records after three steps.
std::vector<at::Tensor> result(const GateOptions& gate, bool checkpointed, int forwards) {
  torch::manual_seed(0);
  Layers model(gate);
  model.train();
  anneal(model, 0.5);
  std::vector<at::Tensor> found;
  for (int step = 0; step < 3; ++step) {
    at::Tensor loss;
    for (int i = 1; i <= forwards; ++i) {
      const auto x = torch::randn({5, 6, 16}, at::requires_grad());
      const auto own = model.forward(x, checkpointed).square().mean() * i;
      loss = loss.defined() ? loss + own : own;
    }
    loss.backward();
  }
  for (const auto& parameter : model.parameters()) {
    found.push_back(parameter.grad().defined() ? parameter.grad() : torch::zeros_like(parameter));
  }
  for (const auto& buffer : model.buffers()) found.push_back(buffer);
  for (const auto& layer : model.layers) {
    found.push_back(layer->gate->expected_heads.detach());
  }
  for (const auto& index : model.last) found.push_back(index);
  found.push_back(at::tensor(at::ArrayRef<int64_t>(model.told)));  // recomputation is not observed
  found.push_back(torch::rand({2}));
  return found;
}

TEST(Recomputation, ChangesNothing) {
  const std::vector<GateOptions> gates{
      BudgetGateOptions(),
      HardConcreteGateOptions().input_dependent(true).init_log_alpha(0.0),
      GumbelSigmoidGateOptions().init_logit(0.0),
      SubsetGateOptions().temperature(2.0),
      SubsetGateOptions().temperature(2.0).scope("layer"),
      RequestedBudgetGateOptions(),
      SleepGateOptions().every(1).asleep_by(0.0),
      SleepGateOptions().every(1).asleep_by(0.0).probe_every(2).execution("selected"),
      SharedHeadsGateOptions().gate(BudgetGateOptions()).shared(std::vector<int64_t>{1})};
  for (size_t i = 0; i < gates.size(); ++i) {
    for (const int forwards : {1, 2}) {
      SCOPED_TRACE("gate " + std::to_string(i) + ", " + std::to_string(forwards) + " forwards");
      const auto plain = result(gates[i], false, forwards);
      const auto again = result(gates[i], true, forwards);
      ASSERT_EQ(plain.size(), again.size());
      for (size_t j = 0; j < plain.size(); ++j) {
        EXPECT_TRUE(at::allclose(plain[j], again[j], 1e-5, 1e-6)) << j << plain[j] << again[j];
      }
    }
  }
}

}  // namespace test_recomputation

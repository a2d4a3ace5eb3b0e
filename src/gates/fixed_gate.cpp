// The same heads for every input, and heads at random.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <cmath>

#include "gates/helpers.h"
#include "headwise/gates.h"
#include "ops/gates/selection_ops.h"

namespace headwise {

FixedGateImpl::FixedGateImpl(FixedGateOptions options_, int64_t embed_dim, int64_t num_heads,
                             const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads), options(std::move(options_)) {
  scale = register_buffer("scale", torch::empty({num_heads}, tensor_options));
  reset_parameters();
}

void FixedGateImpl::reset_parameters() {
  std::vector<double> initial(num_heads(), options.heads() ? 0.0 : 1.0);
  if (options.scale()) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(options.scale()->size()) == num_heads(),
                      "scale must have ", num_heads(), " values, got ", options.scale()->size());
    initial = *options.scale();
  } else if (options.heads()) {
    for (const int64_t head : *options.heads()) {
      TORCH_CHECK_VALUE(head < num_heads(), "heads must be in 0..", num_heads() - 1, ", got ",
                        head);
      initial[head] = 1.0;
    }
  }
  scale.copy_(torch::tensor(initial, at::kDouble));
}

Selection FixedGateImpl::forward(const at::Tensor& x, const at::Tensor&) {
  check_input(x);
  const auto weight = scale.to(x.scalar_type()).expand({x.size(0), -1});  // [B, H]
  const auto [index, count] = select_nonzero(weight);
  return {index, count, weight, {}, {}};
}

RandomGateImpl::RandomGateImpl(RandomGateOptions options_, int64_t embed_dim, int64_t num_heads,
                               const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, num_heads), options(std::move(options_)) {
  relevance = register_buffer("relevance", torch::empty({num_heads}, tensor_options));
  reset_parameters();
}

void RandomGateImpl::reset_parameters() { relevance.uniform_(); }

Selection RandomGateImpl::forward(const at::Tensor& x, const at::Tensor&) {
  check_input(x);
  const auto floats = x.options().dtype(at::kFloat).requires_grad(false);
  const auto scores = options.per_input()
                          ? torch::rand({x.size(0), num_heads()}, floats)
                          : relevance.to(at::kFloat).expand({x.size(0), -1});  // [B, H]
  const auto budget = torch::full({x.size(0)}, options.keep(), floats);        // [B]
  const auto count = budget_count(budget, num_heads(), 1, "round");
  const auto index = select_heads(scores, count);
  return {index, count, selection_mask(index, count, x.scalar_type()), scores, budget};
}

}  // namespace headwise

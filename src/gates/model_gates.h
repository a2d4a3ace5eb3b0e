// Linking gates that are not in one module.
#pragma once

#include <vector>

#include "headwise/gates.h"

namespace headwise {

/// The regulariser of these gates: penalty() of a model that has no others.
at::Tensor penalty_of(const std::vector<GateImpl*>& gates);

/// The gates in `model` and in other gates, itself among them if it is one.
std::vector<GateImpl*> gates_in(const torch::nn::Module& model);

/// The gate inside another one, for `num_heads` heads or groups. @throws c10::ValueError if it
/// cannot be there
std::shared_ptr<GateImpl> make_inner_gate(const GateOptionsBox& options, int64_t embed_dim,
                                          int64_t num_heads,
                                          const at::TensorOptions& tensor_options);

/// Links the gates of scope "model" among these; each set of equal options decides as one.
void link_gates(const std::vector<GateImpl*>& gates);

}  // namespace headwise

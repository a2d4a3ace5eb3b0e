// Shared and routed heads (MoH, Jin et al. 2024, arXiv 2410.11842). Ours: weight 1 for every shared
// head, where MoH weighs both kinds by a second router.
#include "ops/gates/shared_heads.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "headwise/selection.h"
#include "ops/select_heads.h"

namespace headwise {

at::Tensor routed_first(const at::Tensor& shared, int64_t num_heads) {
  ops::check_heads(num_heads, "num_heads");
  TORCH_CHECK_TYPE(shared.scalar_type() == at::kLong || shared.scalar_type() == at::kInt,
                   "shared must be int32 or int64, got ", shared.scalar_type());
  const auto is_shared = at::zeros({num_heads}, shared.options()).index_fill(0, shared, 1);
  return is_shared.argsort(/*stable=*/true, 0, false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> share_heads(const at::Tensor& index,
                                                                       const at::Tensor& count,
                                                                       const at::Tensor& weight,
                                                                       const at::Tensor& relevance,
                                                                       const at::Tensor& shared) {
  TORCH_CHECK_VALUE(index.dim() == 2 && shared.dim() == 1,
                    "index must have shape [B, R] and shared [s], got ", index.sizes(), " and ",
                    shared.sizes());
  const auto batch = index.sym_size(0);
  // Not index.size(1), which fixes every size of index for a compiler, the batch's among them.
  const int64_t routed = index.sym_size(1).guard_int(__FILE__, __LINE__), always = shared.size(0);
  const auto place = routed_first(shared, routed + always).argsort();  // of each head
  const auto ones = at::ones_symint({batch, always}, weight.options().requires_grad(false));
  const auto spread = [&](const at::Tensor& among_routed, const at::Tensor& of_shared) {
    return at::cat({among_routed, of_shared}, 1).index_select(1, place);  // [B, H]
  };
  const auto chosen = spread(selection_mask(index, count, weight.scalar_type()), ones);
  const auto all = ops::narrowed(count + always);
  const auto most = routed > 0 ? relevance.detach().amax(1, true)
                               : at::zeros_symint({batch, 1}, relevance.options());
  return {select_heads(chosen.detach().to(at::kFloat), all), all, spread(weight, ones),
          spread(relevance, most.expand_symint({batch, always}))};
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("routed_first", routed_first);
  m.impl("share_heads", share_heads);
}

}  // namespace headwise

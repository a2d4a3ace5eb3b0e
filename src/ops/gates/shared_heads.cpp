// Gates around another gate: shared and routed heads (MoH, Jin et al. 2024, arXiv 2410.11842), and
// groups. share_heads is ours: weight 1 for every shared head, where MoH weighs both kinds by a
// second router, as route_heads does.
#include "ops/gates/shared_heads.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>

#include "headwise/selection.h"
#include "ops/gates/selection_ops.h"
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> choose_group_heads(const at::Tensor& index,
                                                                  const at::Tensor& count,
                                                                  const at::Tensor& weight,
                                                                  const at::Tensor& place) {
  const auto of_heads = [&](const at::Tensor& groups) { return groups.index_select(1, place); };
  const auto chosen = of_heads(selection_mask(index, count, weight.scalar_type()));  // [B, H]
  const auto [heads, number] = select_nonzero(chosen);
  return {heads, number, of_heads(weight)};
}

// As MoH's released code has them. The paper's equations have no normalisation of the chosen values
// and no factors for the numbers of heads; with them the weights of a token's heads have a mean
// near 1, as without a gate.

namespace {

void check_rows(const std::optional<at::Tensor>& t, const char* name, const at::Tensor& router,
                int64_t size) {
  if (!t) return;
  TORCH_CHECK_VALUE(t->dim() == router.dim() && t->sym_size(-1) == size, name,
                    " must have shape [.., ", size, "], got ", t->sym_sizes());
}

at::Tensor probabilities(const at::Tensor& logits) {
  return at::softmax(logits.to(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat), -1);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_heads(
    const at::Tensor& router, const std::optional<at::Tensor>& shared_router,
    const std::optional<at::Tensor>& kind_router, const at::Tensor& shared, int64_t routed,
    const std::optional<at::Tensor>& padding) {
  TORCH_CHECK_VALUE(router.dim() >= 2 && shared.dim() == 1,
                    "router must have shape [.., R] and shared [s], got ", router.sym_sizes(),
                    " and ", shared.sym_sizes());
  const int64_t experts = router.sym_size(-1).guard_int(__FILE__, __LINE__);
  const int64_t always = shared.size(0);
  TORCH_CHECK_VALUE(routed >= 0 && routed <= experts, "routed must be in 0..", experts, ", got ",
                    routed);
  check_rows(shared_router, "shared_router", router, always);
  check_rows(kind_router, "kind_router", router, 2);
  const auto p = probabilities(router).flatten(0, -2);  // [N, R]
  const auto rows = p.sym_size(0);
  const auto constants = p.options().requires_grad(false);
  const auto count = at::full_symint({rows}, routed, constants.dtype(at::kInt));
  const auto mask = selection_mask(select_heads(p.detach(), count), count, p.scalar_type());
  auto weight = p * mask;
  const double least = p.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                      : std::numeric_limits<float>::epsilon();
  weight = weight / weight.sum(1, true).clamp_min(least) * routed;
  auto of_shared = shared_router ? probabilities(*shared_router).flatten(0, -2) * always
                                 : at::ones_symint({rows, always}, constants);
  if (kind_router) {
    const auto kinds = probabilities(*kind_router).flatten(0, -2) * 2;  // [N, 2]
    of_shared = of_shared * kinds.narrow(1, 0, 1);
    weight = weight * kinds.narrow(1, 1, 1);
  }
  const auto most = experts > 0 ? p.detach().amax(1, true) : at::ones_symint({rows, 1}, constants);
  const auto place = routed_first(shared, experts + always).argsort();  // of each head
  auto sizes = router.sym_sizes().vec();
  sizes.back() = experts + always;
  const auto spread = [&](const at::Tensor& among_routed, const at::Tensor& among_shared) {
    return at::cat({among_routed, among_shared}, 1).index_select(1, place).view_symint(sizes);
  };
  auto chosen = spread(mask, at::ones_symint({rows, always}, constants)).ne(0);
  auto weights = spread(weight, of_shared);
  if (padding) {
    TORCH_CHECK_TYPE(padding->scalar_type() == at::kBool, "padding must be bool, got ",
                     padding->scalar_type());
    const auto hidden = padding->unsqueeze(-1);
    chosen = chosen.logical_and(hidden.logical_not());
    weights = weights.masked_fill(hidden, 0.0);
  }
  return {chosen, weights, spread(p, most.expand_symint({rows, always}))};
}

at::Tensor routing_balance(const at::Tensor& relevance, const at::Tensor& chosen,
                           const at::Tensor& shared, const std::optional<at::Tensor>& padding) {
  TORCH_CHECK_VALUE(relevance.dim() >= 2 && relevance.sym_sizes() == chosen.sym_sizes(),
                    "relevance and chosen must have shape [.., H], got ", relevance.sym_sizes(),
                    " and ", chosen.sym_sizes());
  const int64_t heads = relevance.sym_size(-1).guard_int(__FILE__, __LINE__);
  const int64_t experts = heads - shared.size(0);
  const auto places = routed_first(shared, heads).narrow(0, 0, experts);
  const auto p = relevance.flatten(0, -2).index_select(1, places);  // [N, R]
  const auto ran = chosen.flatten(0, -2).index_select(1, places).to(p.scalar_type());
  const auto seen = padding ? padding->logical_not().flatten().to(p.scalar_type()).unsqueeze(1)
                            : p.new_ones_symint({p.sym_size(0), 1});  // [N, 1]
  const auto rows = seen.sum().clamp_min(1);
  return ((p * seen).sum(0) / rows * ((ran * seen).sum(0) / rows)).sum() * experts;
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("routed_first", routed_first);
  m.impl("share_heads", share_heads);
  m.impl("route_heads", route_heads);
  m.impl("routing_balance", routing_balance);
  m.impl("choose_group_heads", choose_group_heads);
}

}  // namespace headwise

// The module of GroupGate; its formula is in ops/gates/shared_heads.cpp.
#include <ATen/ATen.h>
#include <torch/types.h>

#include <numeric>

#include "gates/model_gates.h"
#include "headwise/gates.h"
#include "ops/gates/shared_heads.h"

namespace headwise {
namespace {

std::vector<int64_t> each_alone(int64_t num_heads) {
  std::vector<int64_t> groups(std::max<int64_t>(num_heads, 0));
  std::iota(groups.begin(), groups.end(), 0);
  return groups;
}

int64_t number_of(const std::vector<int64_t>& groups) {
  return groups.empty() ? 0 : groups.back() + 1;
}

}  // namespace

GroupGateImpl::GroupGateImpl(GroupGateOptions options_, int64_t embed_dim, int64_t num_heads,
                             const at::TensorOptions& tensor_options)
    : GroupGateImpl(std::move(options_), embed_dim, each_alone(num_heads), tensor_options) {}

GroupGateImpl::GroupGateImpl(GroupGateOptions options_, int64_t embed_dim,
                             const std::vector<int64_t>& groups,
                             const at::TensorOptions& tensor_options)
    : CloneableGate(options_, embed_dim, static_cast<int64_t>(groups.size())),
      options(std::move(options_)),
      groups_(groups) {
  for (size_t head = 0; head < groups.size(); ++head) {
    const int64_t before = head == 0 ? -1 : groups[head - 1];
    TORCH_CHECK_VALUE(groups[head] == before + 1 || (head > 0 && groups[head] == before),
                      "groups must be ascending from 0 without gaps, got ", groups[head],
                      " for head ", head);
  }
  place = register_buffer("place", torch::tensor(groups, at::kLong).to(tensor_options.device()));
  gate = register_module(
      "gate", make_inner_gate(options.gate(), embed_dim, number_of(groups), tensor_options));
}

void GroupGateImpl::reset_parameters() {
  place.copy_(torch::tensor(groups_, at::kLong));
  gate->reset_parameters();
}

void GroupGateImpl::reset() {
  GateImpl::reset();
  gate->reset();
}

std::shared_ptr<torch::nn::Module> GroupGateImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = std::make_shared<GroupGateImpl>(options, embed_dim(), groups_);
  copy_to(*copy, device);
  return copy;
}

void GroupGateImpl::start_from(const at::Tensor& relevance, double budget) {
  TORCH_CHECK_VALUE(relevance.sizes() == at::IntArrayRef({num_heads()}),
                    "relevance must have shape [", num_heads(), "], got ", relevance.sizes());
  const auto of = place.to(relevance.device(), at::kLong);
  const auto total = at::zeros({number_of(groups_)}, relevance.options());
  gate->start_from(total.index_add(0, of, relevance) / of.bincount().to(relevance.scalar_type()),
                   budget);
}

Selection GroupGateImpl::forward(const at::Tensor& x, const at::Tensor& key_padding_mask) {
  check_input(x);
  const auto chosen = gate->forward(x, key_padding_mask);  // of the groups
  const auto of = place.to(at::kLong);  // Module::to(dtype) converts every buffer
  const auto [index, count, weight] =
      choose_group_heads(chosen.index, chosen.count, chosen.weight, of);
  if (records()) {
    const auto groups = std::max<int64_t>(number_of(groups_), 1);
    expected_heads = gate->expected_heads.defined()
                         ? gate->expected_heads * (double(num_heads()) / double(groups))
                         : at::Tensor();
  }
  return {index, count, weight,
          chosen.relevance.defined() ? chosen.relevance.index_select(1, of) : at::Tensor(),
          chosen.budget};
}

}  // namespace headwise

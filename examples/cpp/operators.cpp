// The operators by themselves: two heads of largest relevance for each of two sequences, and a
// trace of the choice as JSON. What computes relevance is up to the caller; here it is the norm of
// the queries of each head.
#include <headwise/attention.h>
#include <headwise/selection.h>
#include <headwise/trace.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  const int64_t batch = 2, length = 10, dim = 64, heads = 4;
  const auto x = torch::randn({batch, length, dim});  // [B, L, D]
  const auto in_proj_weight = torch::randn({3 * dim, dim}) / 8;
  const auto out_proj_weight = torch::randn({dim, dim}) / 8;

  const auto q = torch::linear(x, in_proj_weight.slice(0, 0, dim));
  const auto relevance = q.view({batch, length, heads, -1}).norm(2, {1, 3});  // [B, H]
  const auto count = torch::tensor({1, 3}, torch::kInt);  // heads for each sequence
  headwise::Selection selection;
  selection.index = headwise::select_heads(relevance, count);
  selection.count = count;
  selection.weight = headwise::selection_mask(selection.index, count, torch::kFloat);
  selection.relevance = relevance;

  const auto y =
      headwise::selected_self_attention(x, in_proj_weight, {}, out_proj_weight, {}, heads,
                                        selection.index, selection.count, selection.weight);
  std::cout << "output " << y.sizes() << "\n";

  headwise::Trace trace;
  trace.record("layer", heads, selection);
  std::cout << trace.to_json(1) << "\n";
}

// torch.ops.headwise.*: what consists of ATen calls, so that gradients come for free.
#include <torch/library.h>

#include "headwise/cofi.h"
#include "headwise/structure.h"

namespace headwise {

TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "masked_layer_norm(Tensor x, Tensor mask, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-5, bool scaled=True) -> Tensor");
  m.def(
      "structure_size(Tensor[] heads, Tensor attention, Tensor[] neurons, Tensor ffn, "
      "Tensor hidden, int[] head_dims) -> Tensor");
  m.def(
      "sparsity_penalty(Tensor size, float full_size, Tensor progress, float target, "
      "float warmup, Tensor multipliers) -> Tensor");
  m.def(
      "hard_concrete_keep(Tensor log_alpha, float beta=0.6666666666666666, float gamma=-0.1, "
      "float zeta=1.1, float shift=0.0) -> Tensor");
  m.def("match_layers(Tensor distances, Tensor alive) -> Tensor");
  m.def("distillation_loss(Tensor student, Tensor teacher, float temperature=2.0) -> Tensor");
}

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  m.impl("masked_layer_norm", masked_layer_norm);
  m.impl("structure_size", structure_size);
  m.impl("sparsity_penalty", sparsity_penalty);
  m.impl("hard_concrete_keep", hard_concrete_keep);
  m.impl("match_layers", match_layers);
  m.impl("distillation_loss", distillation_loss);
}

}  // namespace headwise

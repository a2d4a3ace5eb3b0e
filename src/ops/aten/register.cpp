// Registers the ATen route under separate names, so that tests without a GPU compare it with the
// oracle. On a CUDA device it runs inputs that the kernels refuse (src/ops/cuda/register.cpp).
#include <torch/library.h>

#include "ops/aten/attention.h"
#include "ops/route.h"

namespace headwise::ops::aten {

TORCH_LIBRARY_IMPL(headwise, CompositeImplicitAutograd, m) {
  using Call = Registered<Route>;
  m.impl("_aten_self_attention_forward", Call::self_forward);
  m.impl("_aten_self_attention_backward", Call::self_backward);
  m.impl("_aten_multihead_attention_forward", Call::multihead_forward);
  m.impl("_aten_multihead_attention_backward", Call::multihead_backward);
  m.impl("_aten_attention_forward", Call::core_forward);
  m.impl("_aten_attention_backward", Call::core_backward);
  m.impl("_aten_projection", Call::projection);
  m.impl("_aten_projection_backward", Call::projection_backward);
  m.impl("_aten_output_projection", Call::output_projection);
  m.impl("_aten_output_projection_backward", Call::output_projection_backward);
}

}  // namespace headwise::ops::aten

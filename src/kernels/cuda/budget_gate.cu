#include "kernels/cuda/budget_gate_kernels.h"
#include "kernels/cuda/layer_kernels.h"

namespace headwise::kernels::cuda {

int budget_gate(const GateArguments& a, Stream stream) {
  const int error = with_element(a.input_type, [&](auto element) {
    using Kernel = PoolKernel<decltype(element)>;
    return launch(Kernel{a}, pool_blocks(a), Kernel::kShared, stream);
  });
  if (error) return error;
  return with_element(a.parameter_type, [&](auto element) {
    using P = decltype(element);
    // Parameters of double come with inputs of double: then all sums are double.
    using Kernel = GateKernel<P, Accumulator<P>>;
    return launch(Kernel{a}, a.batch, Kernel::shared(a), stream);
  });
}

}  // namespace headwise::kernels::cuda

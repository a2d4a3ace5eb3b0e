// The CUDA kernels, compiled for the emulated device.
#include "kernels/cuda/attention_backward.cu"
#include "kernels/cuda/attention_forward.cu"
#include "kernels/cuda/attention_statistics.cu"
#include "kernels/cuda/budget_gate.cu"
#include "kernels/cuda/combine.cu"
#include "kernels/cuda/decode.cu"
#include "kernels/cuda/head_copy.cu"
#include "kernels/cuda/outer.cu"
#include "kernels/cuda/project.cu"
#include "kernels/cuda/select_heads.cu"
#include "kernels/cuda/work_list.cu"

#include "emulator/faults.h"

namespace headwise::emulator {

int faulty(int fault, const float* from, float* to) {
  return kernels::cuda::run_faulty(static_cast<kernels::cuda::Fault>(fault), from, to);
}

}  // namespace headwise::emulator

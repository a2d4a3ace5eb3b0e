// The CUDA kernels, compiled for the emulated device.
#include "kernels/cuda/attention_backward.cu"
#include "kernels/cuda/attention_forward.cu"
#include "kernels/cuda/combine.cu"
#include "kernels/cuda/decode.cu"
#include "kernels/cuda/gate.cu"
#include "kernels/cuda/outer.cu"
#include "kernels/cuda/project.cu"
#include "kernels/cuda/work_list.cu"

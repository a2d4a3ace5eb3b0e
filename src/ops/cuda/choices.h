// What the environment asks for where there is more than one way on the device, so that benchmarks
// can compare them. ValueError for a word that is not in the list.
#pragma once

namespace headwise::ops::device {

/// HEADWISE_CUDA_ATTENTION: `kernels` (default) or `flash` (flash.h).
bool flash_wanted();
/// HEADWISE_CUDA_PRODUCTS: `warps` (default) or `warpgroups` (kernels/cuda/warpgroup.h).
bool warpgroups_wanted();

}  // namespace headwise::ops::device

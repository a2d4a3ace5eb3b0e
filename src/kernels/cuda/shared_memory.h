// How much shared memory a kernel may ask for: checked when it is compiled.
#pragma once

#include <cstdint>

namespace headwise::kernels::cuda {

/// Shared memory of a block on every device since compute capability 8.0 (8.6, 8.9 and 12.0 have
/// the least), and on Hopper.
constexpr int64_t kSharedOfAny = 99 * 1024, kSharedOfHopper = 227 * 1024;
/// True if a kernel fits where it is launched: those for Hopper only are marked (kHopper).
template <typename Kernel>
constexpr bool shared_fits() {
  if constexpr (requires { Kernel::kShared; })
    if constexpr (requires { Kernel::kHopper; })
      return Kernel::kShared <= (Kernel::kHopper ? kSharedOfHopper : kSharedOfAny);
    else
      return Kernel::kShared <= kSharedOfAny;
  else
    return true;
}

}  // namespace headwise::kernels::cuda

#include "ops/cuda/choices.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace headwise::ops::device {
namespace {

bool second_wanted(const char* name, std::string_view first, std::string_view second) {
  const char* const value = std::getenv(name);
  const std::string_view wanted = value ? value : "";
  TORCH_CHECK_VALUE(wanted.empty() || wanted == first || wanted == second, name, " must be ", first,
                    " or ", second, ", got ", wanted);
  return wanted == second;
}

}  // namespace

bool flash_wanted() { return second_wanted("HEADWISE_CUDA_ATTENTION", "kernels", "flash"); }
bool warpgroups_wanted() { return second_wanted("HEADWISE_CUDA_PRODUCTS", "warps", "warpgroups"); }

}  // namespace headwise::ops::device

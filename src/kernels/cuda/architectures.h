// Which devices a list of compiled code serves. The list is written as CMake does:
// "80-real 90a-real 80-virtual" (cmake/HeadwiseCuda.cmake).
#pragma once

#include <string_view>

namespace headwise::kernels::cuda {

/// Asynchronous copies and bfloat16 in tensor cores begin here. A compute capability of 8.0 is 80.
constexpr int kOldestDevice = 80;

/// True if a device of this compute capability runs any code of the list. Machine code (real) runs
/// on the devices of its major number from its minor number on, PTX (virtual) on every later one;
/// with an a, only on the one it was made for, with an f, only on those of its major number.
constexpr bool runs_on(std::string_view list, int capability) {
  while (!list.empty()) {
    const auto end = list.find(' ') < list.size() ? list.find(' ') : list.size();
    const auto word = list.substr(0, end);
    list.remove_prefix(end < list.size() ? end + 1 : end);
    int number = 0;
    size_t at = 0;
    for (; at < word.size() && word[at] >= '0' && word[at] <= '9'; ++at)
      number = 10 * number + (word[at] - '0');
    const char kind = at < word.size() ? word[at] : '-';
    if (number == 0 || number > capability || (kind == 'a' && number != capability)) continue;
    const bool real = word.find("-real") < word.size();
    if ((!real && kind != 'f') || number / 10 == capability / 10) return true;
  }
  return false;
}

}  // namespace headwise::kernels::cuda

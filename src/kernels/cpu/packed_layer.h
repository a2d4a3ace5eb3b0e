// What the packed forward and backward of the layer share.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cpu/layer.h"

namespace headwise::kernels {

inline int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

/// Products of bfloat16 take an even number of terms.
inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

/// Uninitialised memory for `workers` tasks at once.
template <typename T>
struct Scratch {
  int64_t size;
  std::unique_ptr<T[]> data;
  Scratch(int64_t size, int64_t workers) : size(size), data(new T[size * workers]) {}
  T* operator[](int64_t worker) const { return data.get() + worker * size; }
};

/// The heads that some sequence chose, and where each stands among them.
struct UsedHeads {
  std::vector<int64_t> heads, place;
  UsedHeads(const std::vector<ActiveHead>& active, int64_t num_heads) : place(num_heads, -1) {
    for (const auto& a : active)
      if (place[a.h] < 0) {
        place[a.h] = heads.size();
        heads.push_back(a.h);
      }
  }
};

/// Positions in `active` by head, sequences ascending: weights of a head are summed by one worker
/// in one order, so the result does not depend on the number of threads.
inline std::vector<std::vector<int64_t>> by_head(const std::vector<ActiveHead>& active,
                                                 int64_t num_heads) {
  std::vector<std::vector<int64_t>> positions(num_heads);
  for (size_t n = 0; n < active.size(); ++n) positions[active[n].h].push_back(n);
  return positions;
}

}  // namespace headwise::kernels

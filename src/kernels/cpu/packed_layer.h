// Shared by the packed forward and backward of the layer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/layer.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/parallel.h"

namespace headwise::kernels {

inline int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

/// Products of bfloat16 take an even number of terms.
inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

/// Uninitialised memory for `workers` tasks at once, each at the beginning of a cache line: the
/// order in which BLAS sums may depend on where its operands lie, and results should not depend on
/// what else a process has allocated, nor on which worker ran.
template <typename T>
struct Scratch {
  static constexpr int64_t kLine = 64;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  int64_t bytes;  // of one worker
  std::unique_ptr<std::byte, Free> data;
  Scratch(int64_t size, int64_t workers)
      : bytes((size * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine),
        data(static_cast<std::byte*>(std::aligned_alloc(kLine, std::max(bytes * workers, kLine)))) {
    if (!data) throw std::bad_alloc();
  }
  T* operator[](int64_t worker) const { return reinterpret_cast<T*>(data.get() + worker * bytes); }
};

/// The heads that some sequence chose, and the place of each among them.
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

/// Heads, or groups of them, in lists that may run at once: those of one list add to one part, or
/// one copy, of the gradient of the mask. The list's number is that of the copy, if there are
/// copies. Neither depends on the number of threads, so neither do the sums.
template <typename T, typename B, typename H>
std::vector<std::vector<int64_t>> by_mask_part(int64_t items, const MaskGradient<T>& mask,
                                               int64_t batch, int64_t heads, const B& batch_of,
                                               const H& head_of) {
  if (!mask.data || (mask.batch && mask.head))
    return by_place(items, items, [](int64_t n) { return n; });
  if (mask.batch) return by_place(items, batch, batch_of);
  if (mask.head) return by_place(items, heads, head_of);
  return by_place(items, mask.copies, [&](int64_t n) { return n % mask.copies; });
}

/// The same for a layer's chosen heads.
template <typename T>
std::vector<std::vector<int64_t>> by_mask_part(const std::vector<ActiveHead>& active,
                                               const AttentionShape<T>& shape,
                                               const MaskGradient<T>& mask) {
  return by_mask_part(
      active.size(), mask, shape.batch, shape.num_heads, [&](int64_t n) { return active[n].b; },
      [&](int64_t n) { return active[n].h; });
}

/// Positions in `active` by head, sequences ascending: weights of a head are summed by one worker
/// in one order, so the result does not depend on the number of threads.
inline std::vector<std::vector<int64_t>> by_head(const std::vector<ActiveHead>& active,
                                                 int64_t num_heads) {
  return by_place(active.size(), num_heads, [&](int64_t n) { return active[n].h; });
}

/// Right factors: floats are read in place, bfloat16 is packed first.
template <typename T>
struct Factor {
  const T* data = nullptr;
  int64_t row_length = 0;
  const T* column(int64_t n) const { return packed_at(data, row_length, 0, n); }
};

/// Some matrices as right factors; each may be packed by a task of its own.
template <typename T>
class Factors {
 public:
  Factors(int64_t count, int64_t rows, int64_t columns)
      : size_(packed_size<T>(rows, columns)), columns_(columns), factors_(count) {
    if constexpr (sizeof(T) == 2) memory_.reset(new T[count * size_]);
  }
  void set(int64_t n, int64_t rows, const T* x, int64_t ldx) {
    if constexpr (sizeof(T) == 2) {
      pack(rows, columns_, x, ldx, false, memory_.get() + n * size_);
      factors_[n] = {memory_.get() + n * size_, columns_};
    } else {
      factors_[n] = {x, ldx};
    }
  }
  const Factor<T>& operator[](int64_t n) const { return factors_[n]; }

 private:
  int64_t size_, columns_;
  std::unique_ptr<T[]> memory_;
  std::vector<Factor<T>> factors_;
};

template <typename T>
inline void add_row_sum(const T* x, int64_t n, float* sum) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += float(x[i]);
  *sum += total;
}

/// A left factor [d, rows] of a product.
template <typename T>
struct LeftFactor {
  const T* data;
  int64_t row_length, rows;
};

constexpr int64_t kProductColumns = 128;

/// sum [d, width] += sum over the positions in `active` of left(i) [d, rows] right[b] [rows,
/// width], in tiles of columns.
template <typename T, typename Left>
void add_products(const std::vector<int64_t>& positions, const std::vector<ActiveHead>& active,
                  const Factors<T>& right, int64_t d, int64_t width, const Left& left, float* sum) {
  for (int64_t column = 0; column < width; column += kProductColumns)
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto& factor = right[active[positions[i]].b];
      const LeftFactor<T> of = left(i);
      if (of.rows)
        packed_gemm(d, std::min(kProductColumns, width - column),
                    sizeof(T) == 2 ? even(of.rows) : of.rows, of.data, of.row_length,
                    factor.column(column), factor.row_length, sum + column, width, true);
    }
}

}  // namespace headwise::kernels

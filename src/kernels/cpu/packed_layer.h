// Shared by the packed forward and backward of the layer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/layer.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/parallel.h"

namespace headwise::kernels {

inline int64_t blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

/// Products of bfloat16 take an even number of terms.
inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

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

/// A head and some of the sequences that chose it: [begin, end) of its list in by_head().
struct HeadTask {
  int64_t h, begin, end;
};

/// Tasks of at most `most` sequences each.
inline std::vector<HeadTask> head_tasks(const std::vector<std::vector<int64_t>>& positions,
                                        int64_t most) {
  std::vector<HeadTask> tasks;
  for (size_t h = 0; h < positions.size(); ++h)
    for (int64_t begin = 0, users = positions[h].size(); begin < users; begin += most)
      tasks.push_back({int64_t(h), begin, std::min(users, begin + most)});
  return tasks;
}

constexpr int64_t kProductColumns = 128;

/// Matrices of equal sizes as right factors. bfloat16 is packed, in panels of kProductColumns
/// columns whose rows follow one another; each matrix may be packed by a task of its own. Floats
/// are multiplied where they lie: copies of weights and inputs took more than they saved.
template <typename T>
class Factors {
 public:
  static constexpr bool kPacked = sizeof(T) == 2;

  Factors(int64_t count, int64_t rows, int64_t columns)
      : columns_(columns),
        panel_(std::min(kProductColumns, columns)),
        size_(packed_size<T>(rows, panel_)),
        panels_(panel_ ? blocks(columns, panel_) : 0),
        memory_(kPacked ? count * panels_ * size_ : 0),
        places_(kPacked ? 0 : count) {}
  /// Rows [at, at + rows) of matrix n; `at` is even, and 0 for floats, whose rows are all ldx
  /// apart.
  void set(int64_t n, int64_t rows, const T* x, int64_t ldx, int64_t at = 0) {
    if constexpr (kPacked) {
      for (int64_t column = 0; column < columns_; column += panel_)
        pack(rows, std::min(panel_, columns_ - column), x + column, ldx, false,
             memory_.get() + place(n, column) + at * panel_, panel_);
    } else {
      places_[n] = {x, ldx};
    }
  }
  /// The panel of matrix n that begins with a column, a multiple of kProductColumns.
  const T* panel(int64_t n, int64_t column) const {
    if constexpr (kPacked) return memory_.get() + place(n, column);
    return places_[n].data + column;
  }
  int64_t row_length(int64_t n) const {
    if constexpr (kPacked) return panel_;
    return places_[n].row;
  }

 private:
  struct Place {
    const T* data;
    int64_t row;
  };
  int64_t place(int64_t n, int64_t column) const { return (n * panels_ + column / panel_) * size_; }
  int64_t columns_, panel_, size_, panels_;
  Array<T> memory_;
  std::vector<Place> places_;
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

/// Where a panel of a sum of products goes, rows `row_length` apart.
struct Panel {
  float* data;
  int64_t row_length;
};

/// The sum over the positions in `active` of left(i) [d, rows] right[b] [rows, width], in panels of
/// columns: to(column) is the place of each panel, and store(column, columns) is called when it is
/// complete.
template <typename T, typename Left, typename To, typename Store>
void add_products(const std::vector<int64_t>& positions, const std::vector<ActiveHead>& active,
                  const Factors<T>& right, int64_t d, int64_t width, const Left& left, const To& to,
                  const Store& store) {
  for (int64_t column = 0; column < width; column += kProductColumns) {
    const int64_t columns = std::min(kProductColumns, width - column);
    const Panel sum = to(column);
    bool add = false;
    for (size_t i = 0; i < positions.size(); ++i) {
      const LeftFactor<T> of = left(i);
      if (of.rows == 0) continue;
      const int64_t b = active[positions[i]].b;
      packed_gemm(d, columns, sizeof(T) == 2 ? even(of.rows) : of.rows, of.data, of.row_length,
                  right.panel(b, column), right.row_length(b), sum.data, sum.row_length, add);
      add = true;
    }
    if (!add)
      for (int64_t i = 0; i < d; ++i) std::fill_n(sum.data + i * sum.row_length, columns, 0.f);
    store(column, columns);
  }
}

}  // namespace headwise::kernels

// project, combine and outer over packed weights, and over unpacked weights for few rows.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_layer.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/projection.h"

namespace headwise::kernels {
namespace {

using c10::BFloat16;

constexpr int64_t kDepth = 1024;  // terms of a product: what it reads of the weight stays in L2
constexpr int64_t kOutRows = 64;  // a tile of the output: its sums stay in L1
constexpr int64_t kOutColumns = 128;
constexpr int64_t kShortRows = 8;  // sequences shorter than this are projected out together
constexpr int64_t kTogetherRows = 256;

/// The few rows of a head, those of its `users` in `active`. tile [kThinRows, d].
template <typename T, typename W>
void project_thin(const ChosenHeads& chosen, const Rows<const T>& x,
                  const HeadWeight<const W>& weight, const float* bias, const HeadRows<T>& y,
                  const std::vector<int64_t>& users, float* tile) {
  if (users.empty()) return;
  const int64_t L = chosen.rows, d = chosen.width, h = chosen.active[users[0]].h;
  const T* rows[kThinRows];
  int64_t m = 0;
  for (const int64_t n : users)
    for (int64_t i = 0; i < L; ++i) rows[m++] = x.at(chosen.active[n].b, i);
  thin_gemm(m, d, {weight.columns}, rows, weight.of(h, d), weight.ld, tile, d);
  for (const int64_t n : users) {
    convert_rows(L, d, tile, d, bias ? bias + h * d : nullptr, y.at(chosen.active[n], 0), y.row);
    tile += L * d;
  }
}

/// Rows times heads' packed weights. Long sequences: a block of rows stays in L2 and is multiplied
/// by one head after another. Short ones: a head's weight stays there and is multiplied with the
/// sequences that chose it, some of them as one matrix.
template <typename T>
class Project {
 public:
  Project(const ChosenHeads& chosen, const Rows<const T>& x, const HeadWeight<const T>& weight,
          const float* bias, const HeadRows<T>& y)
      : chosen_(chosen),
        x_(x),
        weight_(weight),
        bias_(bias),
        y_(y),
        L_(chosen.rows),
        d_(chosen.width),
        workers_(at::get_num_threads()),
        size_(packed_size<T>(weight.columns, d_)),
        tile_(kRowBlock * d_, workers_) {}

  void run() const {
    if (L_ > kRowBlock / 2)
      by_rows();
    else
      by_heads();
  }

 private:
  void pack_head(int64_t h, T* packed) const {
    pack(weight_.columns, d_, weight_.of(h, d_), weight_.ld, !weight_.turned, packed);
  }

  /// tile [rows, d] = x [rows, C] times a packed weight.
  void multiply(int64_t rows, const T* x, int64_t ldx, const T* packed, float* tile) const {
    for (int64_t k = 0; k < weight_.columns; k += kDepth)
      packed_gemm(rows, d_, std::min(kDepth, weight_.columns - k), x + k, ldx,
                  packed_at(packed, d_, k, 0), d_, tile, d_, k > 0);
  }

  void store(const ActiveHead& a, int64_t row, int64_t rows, const float* tile) const {
    convert_rows(rows, d_, tile, d_, bias_ ? bias_ + a.h * d_ : nullptr, y_.at(a, row), y_.row);
  }

  void by_rows() const {
    const UsedHeads used(chosen_.active, chosen_.num_heads);
    const Array<T> packed(used.heads.size() * size_);
    parallel_tasks(used.heads.size(),
                   [&](int64_t n, int64_t) { pack_head(used.heads[n], packed.get() + n * size_); });
    // Few blocks of rows are also divided by heads.
    const int64_t row_blocks = blocks(L_, kRowBlock), tasks = chosen_.batch * row_blocks;
    const int64_t splits = workers_ == 1 ? 1
                                         : std::clamp<int64_t>(kTasksPerWorker * workers_ / tasks,
                                                               1, used.heads.size());
    parallel_tasks(tasks * splits, [&](int64_t task, int64_t worker) {
      const int64_t b = task / splits / row_blocks, row = task / splits % row_blocks * kRowBlock;
      const int64_t rows = std::min(kRowBlock, L_ - row);
      for (int64_t n = chosen_.first[b] + task % splits; n < chosen_.first[b + 1]; n += splits) {
        const auto& a = chosen_.active[n];
        multiply(rows, x_.at(b, row), x_.row, packed.get() + used.place[a.h] * size_,
                 tile_[worker]);
        store(a, row, rows, tile_[worker]);
      }
      packed_gemm_done<T>();
    });
  }

  void by_heads() const {
    const auto positions = by_head(chosen_.active, chosen_.num_heads);
    const int64_t together = kRowBlock / L_;
    int64_t most = chosen_.batch;
    if (workers_ > 1) {
      most = blocks(chosen_.active.size(), kTasksPerWorker * workers_);
      most = blocks(most, together) * together;  // whole matrices
    }
    const auto tasks = head_tasks(positions, most);
    const auto is_thin = [&](int64_t h) {
      return !weight_.turned && int64_t(positions[h].size()) * L_ <= kThinRows;
    };
    bool packs = false;
    for (int64_t h = 0; h < chosen_.num_heads; ++h) packs |= !is_thin(h);
    const Scratch<T> packed(packs ? size_ : 0, workers_),
        gathered(packs ? kRowBlock * weight_.columns : 0, workers_);
    parallel_tasks(tasks.size(), [&](int64_t task, int64_t worker) {
      const auto [h, begin, end] = tasks[task];
      const auto& users = positions[h];
      if (is_thin(h)) return project_thin(chosen_, x_, weight_, bias_, y_, users, tile_[worker]);
      pack_head(h, packed[worker]);
      for (int64_t first = begin; first < end; first += together)
        multiply_together(users, first, std::min(end, first + together), packed[worker],
                          gathered[worker], tile_[worker]);
      packed_gemm_done<T>();
    });
  }

  /// Users [begin, end) of a head as one matrix.
  void multiply_together(const std::vector<int64_t>& users, int64_t begin, int64_t end,
                         const T* packed, T* gathered, float* tile) const {
    const auto sequence = [&](int64_t n) { return chosen_.active[users[n]].b; };
    const int64_t rows = (end - begin) * L_;
    // Neighbours may lie in memory as one matrix already.
    const bool neighbours = sequence(end - 1) - sequence(begin) == end - 1 - begin;
    if (neighbours && (L_ == 1 ? x_.batch >= x_.width : x_.batch == L_ * x_.row)) {
      multiply(rows, x_.at(sequence(begin), 0), L_ == 1 ? x_.batch : x_.row, packed, tile);
    } else {
      T* to = gathered;
      for (int64_t n = begin; n < end; ++n)
        for (int64_t i = 0; i < L_; ++i) to = std::copy_n(x_.at(sequence(n), i), x_.width, to);
      multiply(rows, gathered, x_.width, packed, tile);
    }
    for (int64_t n = begin; n < end; ++n, tile += L_ * d_)
      store(chosen_.active[users[n]], 0, L_, tile);
  }

  const ChosenHeads& chosen_;
  const Rows<const T>& x_;
  const HeadWeight<const T>& weight_;
  const float* bias_;
  const HeadRows<T>& y_;
  const int64_t L_, d_, workers_, size_;
  const Scratch<float> tile_;
};

/// The sum over a sequence's heads. Their weights are packed in panels of kOutColumns columns; the
/// panels of consecutive used heads are consecutive in memory, and are multiplied as one.
template <typename T>
class Combine {
 public:
  Combine(const ChosenHeads& chosen, const HeadRows<const T>& x, const HeadWeight<const T>& weight,
          const float* bias, const float* factor, T* y)
      : chosen_(chosen),
        x_(x),
        weight_(weight),
        bias_(bias),
        factor_(factor),
        y_(y),
        L_(chosen.rows),
        d_(chosen.width),
        width_(weight.columns),
        tiles_(blocks(width_, kOutColumns)),
        panel_(packed_size<T>(d_, kOutColumns)),
        workers_(at::get_num_threads()),
        used_(chosen.num_heads, -1) {
    for (const auto& a : chosen.active) used_[a.h] = 0;
    for (int64_t h = 0; h < chosen.num_heads; ++h)
      if (used_[h] == 0) {
        used_[h] = heads_.size();
        heads_.push_back(h);
      }
  }

  void run() {
    if (chosen_.batch * L_ == 0) return;
    if (weight_.turned && chosen_.batch * L_ <= kThinRows)
      return combine_heads_thin<T, T>(chosen_, x_, weight_, bias_, factor_, y_);
    const int64_t heads = heads_.size();
    packed_ = Array<T>(heads * tiles_ * panel_);
    // Tile by tile: the heads of a tile are neighbours in the weight's rows.
    parallel_tasks(tiles_ * heads, [&](int64_t task, int64_t) {
      const int64_t n = task % heads, column = task / heads * kOutColumns;
      pack(d_, std::min(kOutColumns, width_ - column),
           weight_.of(heads_[n], d_) + column * (weight_.turned ? weight_.ld : 1), weight_.ld,
           weight_.turned, packed_.get() + task * panel_, kOutColumns);
    });
    const auto groups = alike();
    if (chosen_.batch * L_ < kShortRows * int64_t(groups.size()) && chosen_.batch > 1)
      together();
    else
      by_group(groups);
  }

 private:
  /// Neighbouring sequences with the same choice.
  struct Group {
    int64_t begin, end;
  };
  std::vector<Group> alike() const {
    const auto& first = chosen_.first;
    auto same = [&](int64_t a, int64_t b) {
      const auto head = chosen_.active.begin();
      return std::equal(head + first[a], head + first[a + 1], head + first[b], head + first[b + 1],
                        [](const ActiveHead& x, const ActiveHead& y) { return x.h == y.h; });
    };
    std::vector<Group> groups;
    for (int64_t b = 0; b < chosen_.batch; ++b) {
      if (groups.empty() || !same(groups.back().begin, b)) groups.push_back({b, b});
      groups.back().end = b + 1;
    }
    return groups;
  }

  float factor(const ActiveHead& a) const {
    return factor_ ? factor_[a.b * chosen_.num_heads + a.h] : 1.f;
  }
  /// Row i of a head's rows, times its factor.
  void weigh(const ActiveHead& a, int64_t i, T* y) const {
    const float by = factor(a);
    if (by == 1.f)
      std::copy_n(x_.at(a, i), d_, y);
    else
      scale(x_.at(a, i), d_, by, y);
  }

  /// A tile of sums, row length kOutColumns, to row `row` of all B L.
  void store(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    convert_rows(rows, columns, sums, kOutColumns, bias_ ? bias_ + column : nullptr,
                 y_ + row * width_ + column, width_);
  }

  /// The sum over the heads of a group, tile by tile, in the order of the heads.
  void by_group(const std::vector<Group>& groups) const {
    struct Task {
      int64_t group, row;
    };
    std::vector<Task> tasks;
    for (size_t g = 0; g < groups.size(); ++g)
      for (int64_t row = 0; row < (groups[g].end - groups[g].begin) * L_; row += kOutRows)
        tasks.push_back({int64_t(g), row});
    // Few blocks of rows are also divided by columns.
    const int64_t count = tasks.size(), ld = chosen_.num_heads * d_ + 16, heads = heads_.size();
    const int64_t splits =
        workers_ == 1 ? 1 : std::min(tiles_, blocks(kTasksPerWorker * workers_, count));
    const int64_t split = blocks(tiles_, splits);
    const int64_t longest = std::max<int64_t>(1, kDepth / d_);  // heads of a product
    Scratch<float> sums(kOutRows * kOutColumns, workers_);
    Scratch<T> weighted(kOutRows * ld, workers_);
    parallel_tasks(count * splits, [&](int64_t task, int64_t worker) {
      const auto [b0, b1] = groups[tasks[task / splits].group];
      const int64_t row = tasks[task / splits].row;
      const int64_t rows = std::min(kOutRows, (b1 - b0) * L_ - row);
      const int64_t begin = task % splits * split, end = std::min(tiles_, begin + split);
      if (begin >= end) return;
      const int64_t chosen = chosen_.first[b0 + 1] - chosen_.first[b0];
      const auto head = [&](int64_t n) { return chosen_.active[chosen_.first[b0] + n].h; };
      T* const left = weighted[worker];  // [rows, chosen d]
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t b = b0 + (row + i) / L_;
        for (int64_t n = 0; n < chosen; ++n)
          weigh(chosen_.active[chosen_.first[b] + n], (row + i) % L_, left + i * ld + n * d_);
      }
      float* const c = sums[worker];
      if (chosen == 0) std::fill_n(c, kOutRows * kOutColumns, 0.f);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t column = tile * kOutColumns, columns = std::min(kOutColumns, width_ - column);
        for (int64_t n = 0, next; n < chosen; n = next) {
          const int64_t place = used_[head(n)];
          next = n + 1;
          while (next < chosen && next - n < longest && used_[head(next)] == place + next - n)
            ++next;
          packed_gemm(rows, columns, (next - n) * d_, left + n * d_, ld,
                      packed_.get() + (tile * heads + place) * panel_, kOutColumns, c, kOutColumns,
                      n > 0);
        }
        store(c, b0 * L_ + row, rows, column, columns);
      }
      packed_gemm_done<T>();
    });
  }

  /// Of short sequences, those that chose a head are multiplied together, head after head.
  void together() const {
    const int64_t sequences = std::max<int64_t>(1, kTogetherRows / L_);  // of a task
    const int64_t row_tasks = blocks(chosen_.batch, sequences), most = sequences * L_;
    const int64_t heads = heads_.size();
    Scratch<float> floats(2 * most * kOutColumns, workers_);
    Scratch<T> weighted(most * d_, workers_);
    parallel_tasks(row_tasks * tiles_, [&](int64_t task, int64_t worker) {
      const int64_t b0 = task / tiles_ * sequences, b1 = std::min(chosen_.batch, b0 + sequences);
      const int64_t tile = task % tiles_, column = tile * kOutColumns;
      const int64_t columns = std::min(kOutColumns, width_ - column);
      float *sums = floats[worker], *product = sums + most * kOutColumns;
      std::fill_n(sums, (b1 - b0) * L_ * kOutColumns, 0.f);
      const auto begin = chosen_.active.begin() + chosen_.first[b0];
      const auto end = chosen_.active.begin() + chosen_.first[b1];
      for (int64_t n = 0; n < heads; ++n) {
        T* to = weighted[worker];
        for (auto a = begin; a != end; ++a)
          if (a->h == heads_[n])
            for (int64_t i = 0; i < L_; ++i, to += d_) weigh(*a, i, to);
        const int64_t rows = (to - weighted[worker]) / d_;
        if (rows == 0) continue;
        packed_gemm(rows, columns, d_, weighted[worker], d_,
                    packed_.get() + (tile * heads + n) * panel_, kOutColumns, product, kOutColumns,
                    false);
        const float* from = product;
        for (auto a = begin; a != end; ++a)
          if (a->h == heads_[n])
            for (int64_t i = 0; i < L_; ++i, from += kOutColumns) {
              float* const sum = sums + ((a->b - b0) * L_ + i) * kOutColumns;
              convert_rows(1, columns, from, columns, sum, sum, columns);
            }
      }
      store(sums, b0 * L_, (b1 - b0) * L_, column, columns);
      packed_gemm_done<T>();
    });
  }

  const ChosenHeads& chosen_;
  const HeadRows<const T>& x_;
  const HeadWeight<const T>& weight_;
  const float *bias_, *factor_;
  T* const y_;
  const int64_t L_, d_, width_, tiles_, panel_, workers_;
  std::vector<int64_t> used_, heads_;  // place of a head among those that are used; they
  Array<T> packed_;                    // [tiles, used heads][d, kOutColumns]
};

}  // namespace

template <typename T>
bool packed_projection_supported(int64_t width, int64_t columns) {
  // Pairs of rows for bfloat16, whole vectors for speed.
  auto fits = [](int64_t n) { return n > 0 && n % 8 == 0; };
  return packed_gemm_supported<T>() && fits(width) && fits(columns);
}

template <typename T>
void project_heads_packed(const ChosenHeads& chosen, const Rows<const T>& x,
                          const HeadWeight<const T>& weight, const float* bias,
                          const HeadRows<T>& y) {
  if (chosen.active.empty() || chosen.rows == 0) return;
  Project<T>(chosen, x, weight, bias, y).run();
}

template <typename T>
void combine_heads_packed(const ChosenHeads& chosen, const HeadRows<const T>& x,
                          const HeadWeight<const T>& weight, const float* bias, const float* factor,
                          T* y) {
  Combine<T>(chosen, x, weight, bias, factor, y).run();
}

template <typename T, typename W>
void outer_heads_packed(const ChosenHeads& chosen, const HeadRows<const T>& y,
                        const Rows<const T>& x, const float* factor, const HeadWeight<W>& weight,
                        float* sums) {
  const int64_t L = chosen.rows, d = chosen.width, width = weight.columns, ld = even(L);
  const int64_t workers = at::get_num_threads();
  const auto positions = by_head(chosen.active, chosen.num_heads);
  size_t most = 0;
  for (const auto& list : positions) most = std::max(most, list.size());
  if (most == 0) return;
  Factors<T> right(weight.data ? chosen.batch : 0, L, width);
  if (weight.data)
    parallel_tasks(chosen.batch, [&](int64_t b, int64_t) {
      if (chosen.first[b] < chosen.first[b + 1]) right.set(b, L, x.at(b, 0), x.row);
    });
  Scratch<T> turned(most * d * ld, workers);
  const int64_t panel = weight.data ? d * kProductColumns : 0;
  Scratch<float> floats(2 * panel + 2 * kTransposeRows * d, workers);
  parallel_tasks(chosen.num_heads, [&](int64_t h, int64_t worker) {
    const auto& users = positions[h];
    if (users.empty()) return;
    float *const sum = floats[worker], *const columns_of = sum + panel;
    auto left = [&](size_t i) -> LeftFactor<T> { return {turned[worker] + i * d * ld, ld, L}; };
    for (size_t i = 0; i < users.size(); ++i) {
      const auto& a = chosen.active[users[i]];
      T* const to = turned[worker] + i * d * ld;
      transpose_scaled(L, d, y.at(a, 0), y.row, factor ? factor[a.b * chosen.num_heads + h] : 1.f,
                       to, ld, columns_of + panel);
      for (int64_t c = 0; c < d; ++c) {
        if (L < ld) to[c * ld + L] = T(0.f);
        if (sums) add_row_sum(to + c * ld, L, sums + h * d + c);
      }
    }
    W* const to = weight.data ? weight.of(h, d) : nullptr;
    if (to)
      add_products<T>(
          users, chosen.active, right, d, width, left,
          [&](int64_t) { return Panel{sum, kProductColumns}; },
          [&](int64_t column, int64_t columns) {
            if (weight.turned) {
              transpose(d, columns, sum, kProductColumns, columns_of, d);
              convert_rows(columns, d, columns_of, d, nullptr, to + column * weight.ld, weight.ld);
            } else {
              convert_rows(d, columns, sum, kProductColumns, nullptr, to + column, weight.ld);
            }
          });
    packed_gemm_done<T>();
  });
}

template <typename T, typename W>
void project_heads_thin(const ChosenHeads& chosen, const Rows<const T>& x,
                        const HeadWeight<const W>& weight, const float* bias,
                        const HeadRows<T>& y) {
  const auto positions = by_head(chosen.active, chosen.num_heads);
  Scratch<float> tile(kThinRows * chosen.width, at::get_num_threads());
  parallel_tasks(chosen.num_heads, [&](int64_t h, int64_t worker) {
    project_thin(chosen, x, weight, bias, y, positions[h], tile[worker]);
  });
}

template <typename T, typename W>
void combine_heads_thin(const ChosenHeads& chosen, const HeadRows<const T>& x,
                        const HeadWeight<const W>& weight, const float* bias, const float* factor,
                        T* y) {
  const int64_t L = chosen.rows, d = chosen.width, width = weight.columns, m = chosen.batch * L;
  if (m == 0) return;
  std::vector<int64_t> place(chosen.num_heads, -1), first;
  for (const auto& a : chosen.active) place[a.h] = 0;
  for (int64_t h = 0; h < chosen.num_heads; ++h)
    if (place[h] == 0) {
      place[h] = first.size();
      first.push_back(h * d);
    }
  // Rows side by side over the heads that some sequence chose, zeros where a sequence did not.
  const int64_t heads = first.size(), row = heads * d;
  std::vector<T> rows(m * row, T(0.f));
  for (const auto& a : chosen.active)
    for (int64_t i = 0; i < L; ++i)
      scale(x.at(a, i), d, factor ? factor[a.b * chosen.num_heads + a.h] : 1.f,
            rows.data() + (a.b * L + i) * row + place[a.h] * d);
  const T* at[kThinRows];
  for (int64_t i = 0; i < m; ++i) at[i] = rows.data() + i * row;
  Scratch<float> sums(kThinRows * kOutColumns, at::get_num_threads());
  parallel_tasks(blocks(width, kOutColumns), [&](int64_t task, int64_t worker) {
    const int64_t column = task * kOutColumns, columns = std::min(kOutColumns, width - column);
    thin_gemm(m, columns, {d, heads, first.data()}, at, weight.data + column * weight.ld, weight.ld,
              sums[worker], kOutColumns);
    convert_rows(m, columns, sums[worker], kOutColumns, bias ? bias + column : nullptr, y + column,
                 width);
  });
}

#define HEADWISE_INSTANTIATE(T)                                                                    \
  template bool packed_projection_supported<T>(int64_t, int64_t);                                  \
  template void project_heads_packed<T>(const ChosenHeads&, const Rows<const T>&,                  \
                                        const HeadWeight<const T>&, const float*,                  \
                                        const HeadRows<T>&);                                       \
  template void combine_heads_packed<T>(const ChosenHeads&, const HeadRows<const T>&,              \
                                        const HeadWeight<const T>&, const float*, const float*,    \
                                        T*);                                                       \
  template void outer_heads_packed<T, T>(const ChosenHeads&, const HeadRows<const T>&,             \
                                         const Rows<const T>&, const float*, const HeadWeight<T>&, \
                                         float*);
HEADWISE_INSTANTIATE(float)
HEADWISE_INSTANTIATE(BFloat16)
#undef HEADWISE_INSTANTIATE

template void outer_heads_packed<BFloat16, float>(const ChosenHeads&,
                                                  const HeadRows<const BFloat16>&,
                                                  const Rows<const BFloat16>&, const float*,
                                                  const HeadWeight<float>&, float*);
template void project_heads_thin<float, c10::Half>(const ChosenHeads&, const Rows<const float>&,
                                                   const HeadWeight<const c10::Half>&, const float*,
                                                   const HeadRows<float>&);
template void combine_heads_thin<float, c10::Half>(const ChosenHeads&, const HeadRows<const float>&,
                                                   const HeadWeight<const c10::Half>&, const float*,
                                                   const float*, float*);

}  // namespace headwise::kernels

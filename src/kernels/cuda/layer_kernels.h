// The kernels behind layer.h.
#pragma once

#include <type_traits>

#include "kernels/cuda/layer.h"
#include "kernels/cuda/tile.h"
#include "kernels/cuda/warpgroup.h"

namespace headwise::kernels::cuda {

/// Shared memory of `stages` tiles of A and B.
template <typename T>
struct Stages {
  T* memory;
  int64_t a_size, b_size;
  HEADWISE_DEVICE T* a(int stage) const { return memory + stage * (a_size + b_size); }
  HEADWISE_DEVICE T* b(int stage) const { return a(stage) + a_size; }
};

template <typename T, typename G = Gemm<T, 128, 128>>
struct ProjectKernel {
  using Product = typename G::Product;
  using C = Accumulator<T>;
  static constexpr int kThreads = Product::kThreads, kM = Product::kM, kN = Product::kN, kK = G::kK,
                       kResident = G::kResident, kLeft = G::template kTile<kM>,
                       kRight = G::template kTile<kN>;
  static constexpr int64_t kOffsets = 2 * kN * sizeof(int64_t);
  static constexpr bool kHopper = G::kAsyncReads;
  static constexpr int64_t kShared = kOffsets + int64_t{G::kStages} * (kLeft + kRight) * sizeof(T);
  ProjectArguments args;

  HEADWISE_DEVICE void operator()() const {
    const auto tile = project_tile(args, block_index(), kM, kN);
    const auto& part = args.part[tile.part];
    const auto& chosen = args.chosen;
    const int64_t d = args.width;
    const int64_t columns = chosen.count[tile.b] * d - tile.column;
    const int64_t rows = (part.limit ? part.limit[tile.b] : part.rows) - tile.row;
    if (columns <= 0 || rows <= 0) return;  // the whole block
    // Of each column of the tile: the row of the weight, -1: none; and where the packed rows begin.
    auto* const weight_row = reinterpret_cast<int64_t*>(shared_memory());
    auto* const packed_at = weight_row + kN;
    const int32_t* const heads = chosen.head + tile.b * chosen.columns;
    const int64_t first_place = chosen.first[tile.b];
    for (int n = thread_index(); n < kN; n += kThreads) {
      const unsigned column = static_cast<unsigned>(tile.column) + n,
                     width = static_cast<unsigned>(d);
      const unsigned place = column / width, c = column - place * width;
      const int32_t h = n < columns ? heads[place] : -1;
      weight_row[n] = h < 0 ? -1 : h * d + c;
      packed_at[n] = ((first_place + place) * part.packed_rows + tile.row) * d + c;
    }
    barrier();
    const T* const input = static_cast<const T*>(part.input.data);
    const T* const weight = static_cast<const T*>(part.weight);
    const T* const first_row = input + part.input.offset(tile.b, tile.row);
    const Stages<T> stages{reinterpret_cast<T*>(shared_memory() + kOffsets), kLeft, kRight};
    Product product(rows, columns);
    pipeline<G::kStages, G::kAsyncReads>(
        tiles_of(part.depth, kK),
        [&](int step, int stage) {
          const int64_t k = int64_t{step} * kK;
          const int valid = static_cast<int>(smaller<int64_t>(part.depth - k, kK));
          G::template load<kM>(
              stages.a(stage), input,
              [&](int r) { return r < rows ? first_row + r * part.input.row_stride + k : nullptr; },
              valid, part.vectors);
          G::template load<kN>(
              stages.b(stage), weight,
              [&](int r) {
                return weight_row[r] >= 0 ? weight + weight_row[r] * part.weight_stride + k
                                          : nullptr;
              },
              valid, part.vectors);
        },
        [&](int, int stage) { G::step(product, stages.a(stage), stages.b(stage), C(1)); });
    T* const packed = static_cast<T*>(part.packed);
    const T* const bias = static_cast<const T*>(part.bias);
    const bool pairs = d % 2 == 0;  // then two neighbouring columns are of one head
    product.each([&](int r, int column, C first, C second) {
      if (r >= rows) return;
      const int64_t row = weight_row[column], next = weight_row[column + 1];
      if (bias) {
        if (row >= 0) first += static_cast<C>(bias[row]);
        if (next >= 0) second += static_cast<C>(bias[next]);
      }
      if (pairs) {
        if (row >= 0) store_pair<T>(packed + packed_at[column] + r * d, 0, 2, first, second, true);
        return;
      }
      if (row >= 0) packed[packed_at[column] + r * d] = static_cast<T>(first);
      if (next >= 0) packed[packed_at[column + 1] + r * d] = static_cast<T>(second);
    });
  }
};

template <typename T, typename G = Gemm<T, 128, 128>>
struct CombineKernel {
  using Product = typename G::Product;
  using C = Accumulator<T>;
  static constexpr int kThreads = Product::kThreads, kM = Product::kM, kN = Product::kN, kK = G::kK,
                       kResident = G::kResident, kLeft = G::template kTile<kM>,
                       kRight = G::template kTile<kN>;
  static constexpr bool kHopper = G::kAsyncReads;
  static constexpr int64_t kShared = int64_t{G::kStages} * (kLeft + kRight) * sizeof(T);
  CombineArguments args;

  HEADWISE_DEVICE void operator()() const {
    const auto tile = combine_tile(args, block_index(), kM, kN);
    const auto& chosen = args.chosen;
    const int64_t d = args.width;
    const int count = chosen.count[tile.b];
    const int64_t rows = args.rows - tile.row, columns = args.columns - tile.column;
    const int32_t* const heads = chosen.head + tile.b * chosen.columns;
    const T* const weight = static_cast<const T*>(args.weight);
    const C* const factor = static_cast<const C*>(args.factor);
    const Stages<T> stages{reinterpret_cast<T*>(shared_memory()), kLeft, kRight};
    Product product(rows, columns);
    pipeline<G::kStages, G::kAsyncReads>(
        combine_steps(args, count, kK),
        [&](int number, int stage) {
          const auto step = combine_step(args, number, count, kK);
          const auto& part = args.part[step.part];
          const int64_t h = heads[step.n];
          const int valid = h < 0 ? 0 : static_cast<int>(smaller<int64_t>(d - step.column, kK));
          const int64_t limit = (part.limit ? part.limit[tile.b] : args.rows) - tile.row;
          const T* const packed = static_cast<const T*>(part.packed);
          const T* const first_row =
              packed + ((chosen.first[tile.b] + step.n) * part.packed_rows + tile.row) * d +
              step.column;
          const T* const first_weight = weight + tile.column * args.weight_stride +
                                        (step.part * chosen.num_heads + h) * d + step.column;
          G::template load<kM>(
              stages.a(stage), packed,
              [&](int r) { return r < limit && r < rows ? first_row + r * d : nullptr; }, valid,
              args.vectors);
          G::template load<kN>(
              stages.b(stage), weight,
              [&](int r) { return r < columns ? first_weight + r * args.weight_stride : nullptr; },
              valid, args.vectors);
        },
        [&](int number, int stage) {
          C scale = 1;
          if (factor) {
            const int64_t h = heads[combine_step(args, number, count, kK).n];
            if (h >= 0) scale = factor[tile.b * chosen.num_heads + h];
          }
          G::step(product, stages.a(stage), stages.b(stage), scale);
        });
    const T* const bias = static_cast<const T*>(args.bias);
    T* const output = static_cast<T*>(args.output);
    product.each([&](int r, int column, C first, C second) {
      if (r >= rows) return;
      const int64_t at = tile.column + column;
      if (bias) {
        if (at < args.columns) first += static_cast<C>(bias[at]);
        if (at + 1 < args.columns) second += static_cast<C>(bias[at + 1]);
      }
      store_pair<T>(output + (tile.b * args.rows + tile.row + r) * args.columns, at, args.columns,
                    first, second, args.columns % 2 == 0);
    });
  }
};

template <typename T>
struct OuterKernel {
  using G = Gemm<T, 64, 128>;
  using Product = typename G::Product;
  using C = Accumulator<T>;
  static constexpr int kThreads = Product::kThreads, kM = Product::kM, kN = Product::kN, kK = G::kK,
                       kStrideA = kM + G::kPad, kStrideB = kN + G::kPad, kResident = G::kResident;
  static constexpr int64_t kShared = int64_t{G::kStages} * kK * (kStrideA + kStrideB) * sizeof(T);
  OuterArguments args;

  HEADWISE_DEVICE void operator()() const {
    const auto tile = outer_tile(args, block_index(), kM, kN);
    const auto& part = args.part[tile.part];
    const auto& chosen = args.chosen;
    const int64_t d = args.width, H = chosen.num_heads;
    const int64_t rows = d - tile.row, columns = args.columns - tile.column;
    const auto range = split_rows(part.rows, args.splits, tile.split, kK);
    const unsigned steps_each = static_cast<unsigned>(tiles_of(range.last - range.first, kK));
    const int32_t* const slots = chosen.pair_slot + chosen.offset[tile.h];
    const int64_t pairs = chosen.offset[tile.h + 1] - chosen.offset[tile.h];
    const unsigned columns_of_index = static_cast<unsigned>(chosen.columns);
    const T* const packed = static_cast<const T*>(part.packed);
    const T* const input = static_cast<const T*>(part.input.data);
    const C* const factor = static_cast<const C*>(args.factor);
    const Stages<T> stages{reinterpret_cast<T*>(shared_memory()), kK * kStrideA, kK * kStrideB};
    const bool sums = args.sums && tile.column == 0;
    Product product(rows, columns);
    C sum = 0;  // of column thread_index() of the packed rows
    pipeline<G::kStages>(
        pairs * steps_each,
        [&](int step, int stage) {
          // In 32 bits: a division in 64 takes as long as a step.
          const unsigned pair = step / steps_each;
          const int64_t slot = slots[pair];
          const unsigned b = static_cast<unsigned>(slot) / columns_of_index;
          const int64_t place = chosen.first[b] + slot - b * columns_of_index;
          const int64_t first = range.first + int64_t{step - pair * steps_each} * kK;
          const int64_t limit = part.limit ? part.limit[b] : part.rows;
          const int64_t valid = smaller(limit, range.last) - first;
          const T* const left = packed + (place * part.packed_rows + first) * d + tile.row;
          const T* const right = input + part.input.offset(b, first) + tile.column;
          load_tile<T, kK, kM, kStrideA, kThreads>(
              stages.a(stage), packed, [&](int r) { return r < valid ? left + r * d : nullptr; },
              static_cast<int>(smaller<int64_t>(rows, kM)), args.vectors);
          load_tile<T, kK, kN, kStrideB, kThreads>(
              stages.b(stage), input,
              [&](int r) { return r < valid ? right + r * part.input.row_stride : nullptr; },
              static_cast<int>(smaller<int64_t>(columns, kN)), args.vectors);
        },
        [&](int step, int stage) {
          C scale = 1;
          if (factor) {
            const unsigned slot = slots[step / steps_each];
            scale = factor[slot / columns_of_index * H + tile.h];
          }
          product.template step<kK, kStrideA, kStrideB, true>(stages.a(stage), stages.b(stage),
                                                              scale);
          if (sums && thread_index() < kM)
            for (int r = 0; r < kK; ++r)
              sum += scale * static_cast<C>(stages.a(stage)[r * kStrideA + thread_index()]);
        });
    const int64_t group = (tile.split * args.parts + tile.part) * H + tile.h;
    // Generic over the type that is stored: the elements' own if there is one split.
    const auto store = [&](auto* const partial, auto* const all_sums) {
      using Stored = std::remove_pointer_t<std::remove_const_t<decltype(partial)>>;
      product.each([&](int r, int column, C first, C second) {
        if (r >= rows) return;
        Stored* const row = partial + (group * d + tile.row + r) * args.columns;
        const int64_t at = tile.column + column;
        if (at < args.columns) row[at] = static_cast<Stored>(first);
        if (at + 1 < args.columns) row[at + 1] = static_cast<Stored>(second);
      });
      if (sums && thread_index() < smaller<int64_t>(rows, kM))
        all_sums[group * d + tile.row + thread_index()] = static_cast<Stored>(sum);
    };
    if (args.rounded)
      store(static_cast<T*>(args.partial), static_cast<T*>(args.sums));
    else
      store(static_cast<C*>(args.partial), static_cast<C*>(args.sums));
  }
};

/// run(T{}) with the type that `type` names.
template <typename Run>
int with_element(Element type, const Run& run) {
  switch (type) {
    case Element::f64:
      return run(double{});
    case Element::f32:
      return run(float{});
    case Element::f16:
      return run(Half{});
    case Element::bf16:
      return run(BFloat16{});
  }
  return 1;  // cudaErrorInvalidValue
}

}  // namespace headwise::kernels::cuda

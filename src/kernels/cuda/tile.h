// Tiles of matrix products: how a block brings rows to shared memory, and how its warps multiply
// them, with tensor cores for 16-bit elements and plain arithmetic for the others.
#pragma once

#include "kernels/cuda/device.h"

namespace headwise::kernels::cuda {

template <typename T>
HEADWISE_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

/// Rows of a tile [kRows][kColumns], kStride elements apart in shared memory: row(r) points to the
/// first of `columns` elements of row r, or is null; what is missing is zero. With `vectors`, all
/// those addresses are aligned to 16 bytes and the copy is asynchronous.
template <typename T, int kRows, int kColumns, int kStride, int kThreads, typename Row>
HEADWISE_DEVICE void load_tile(T* tile, const T* base, const Row& row, int columns, bool vectors) {
  constexpr int kVector = 16 / sizeof(T), kChunks = kColumns / kVector;
  static_assert(kColumns % kVector == 0 && kStride % kVector == 0);
  for (int n = thread_index(); n < kRows * kChunks; n += kThreads) {
    const int r = n / kChunks, c = n % kChunks * kVector;
    const T* from = row(r);
    T* to = tile + r * kStride + c;
    int valid = from ? columns - c : 0;
    valid = valid < 0 ? 0 : smaller(valid, kVector);
    if (vectors) {
      copy_async(to, valid ? from + c : base, valid * static_cast<int>(sizeof(T)));
    } else {
      for (int i = 0; i < kVector; ++i) to[i] = i < valid ? from[c + i] : static_cast<T>(0.f);
    }
  }
}

/// Runs load(step, stage) kStages - 1 steps ahead of compute(step, stage). kAsyncReads: the tensor
/// cores themselves read what arrives.
template <int kStages, bool kAsyncReads = false, typename Load, typename Compute>
HEADWISE_DEVICE void pipeline(int64_t total, const Load& load, const Compute& compute) {
  const int steps = static_cast<int>(total);
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s, s);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    if constexpr (kAsyncReads) async_read_fence();
    barrier();  // the step has arrived for all threads, and all have finished the one before
    const int next = step + kStages - 1;
    if (next < steps) load(next, next % kStages);
    copy_commit();
    compute(step, step % kStages);
  }
  copy_wait<0>();
  barrier();
}

template <typename T>
HEADWISE_DEVICE uint32_t scaled_pair(uint32_t bits, float scale) {
  float low, high;
  unpack<T>(bits, low, high);
  return pack<T>(low * scale, high * scale);
}

/// Fragment of a 16 x 16 block whose rows lie in rows of shared memory.
template <typename T>
HEADWISE_DEVICE void load_left(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices(a, tile + lane % 16 * stride + lane / 16 * 8);
}
/// The same where its columns lie in rows of shared memory.
template <typename T>
HEADWISE_DEVICE void load_left_transposed(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = lane_index(), matrix = lane / 8;
  load_matrices_transposed(a, tile + (matrix / 2 * 8 + lane % 8) * stride + matrix % 2 * 8);
}
/// Fragments of two 16 x 8 blocks of the right factor, b[0..1] and b[2..3], whose columns (n) lie
/// in rows of shared memory.
template <typename T>
HEADWISE_DEVICE void load_right(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = lane_index();
  load_matrices(b, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
}
/// The same where its rows (k) lie in rows of shared memory.
template <typename T>
HEADWISE_DEVICE void load_right_transposed(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = lane_index(), matrix = lane / 8;
  load_matrices_transposed(b, tile + (matrix % 2 * 8 + lane % 8) * stride + matrix / 2 * 8);
}

/// A block's product C [kM, kN] += scale * A B by 256 threads, C in registers. Warps whose part of
/// C lies outside [rows, columns] do nothing.
template <typename T, int kM_, int kN_>
struct TensorProduct {
  static constexpr int kM = kM_, kN = kN_, kThreads = 256;
  static constexpr int kWarpsN = kM >= kN ? 2 : 4, kWarpsM = 8 / kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  float c[kTilesM][kTilesN][4] = {};
  int row, column;
  bool active;

  HEADWISE_DEVICE TensorProduct(int64_t rows, int64_t columns)
      : row(warp_index() / kWarpsN * kWarpM),
        column(warp_index() % kWarpsN * kWarpN),
        active(row < rows && column < columns) {}

  /// A [kM][kK] and the columns of B [kN][kK] in rows of kStride elements; or, kTransposed, the
  /// rows of A' [kK][kM] and of B [kK][kN] in rows of kStrideA and kStride elements.
  template <int kK, int kStrideA, int kStrideB, bool kTransposed>
  HEADWISE_DEVICE void step(const T* a, const T* b, float scale) {
    if (!active) return;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      uint32_t left[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        if constexpr (kTransposed)
          load_left_transposed(left[m], a + k * kStrideA + row + 16 * m, kStrideA);
        else
          load_left(left[m], a + (row + 16 * m) * kStrideA + k, kStrideA);
        if (scale != 1.f)
          for (int i = 0; i < 4; ++i) left[m][i] = scaled_pair<T>(left[m][i], scale);
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t right[4];
        if constexpr (kTransposed)
          load_right_transposed(right, b + k * kStrideB + column + 8 * n, kStrideB);
        else
          load_right(right, b + (column + 8 * n) * kStrideB + k, kStrideB);
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          multiply_accumulate<T>(c[m][n], left[m], right[0], right[1]);
          multiply_accumulate<T>(c[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  /// visit(row, column, value, value of the next column) of everything that this thread holds.
  template <typename Visit>
  HEADWISE_DEVICE void each(const Visit& visit) const {
    if (!active) return;
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          visit(row + 16 * m + g + 8 * half, column + 8 * n + 2 * t, c[m][n][2 * half],
                c[m][n][2 * half + 1]);
  }
};

/// The same for float and double: thread (y, x) of 16 x 16 holds 4 x 4 elements.
template <typename T, int kM_, int kN_>
struct PlainProduct {
  static constexpr int kM = kM_, kN = kN_, kThreads = 256;
  static_assert(kM == 64 && kN == 64);
  T c[4][4] = {};
  int row, column;

  HEADWISE_DEVICE PlainProduct(int64_t, int64_t)
      : row(thread_index() / 16 * 4), column(thread_index() % 16 * 4) {}

  template <int kK, int kStrideA, int kStrideB, bool kTransposed>
  HEADWISE_DEVICE void step(const T* a, const T* b, T scale) {
#pragma unroll 4
    for (int k = 0; k < kK; ++k) {
      T left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = scale * (kTransposed ? a[k * kStrideA + row + i] : a[(row + i) * kStrideA + k]);
        right[i] = kTransposed ? b[k * kStrideB + column + i] : b[(column + i) * kStrideB + k];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) c[i][j] += left[i] * right[j];
    }
  }

  template <typename Visit>
  HEADWISE_DEVICE void each(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += 2) visit(row + i, column + j, c[i][j], c[i][j + 1]);
  }
};

/// Sizes of the products of T: C is kM x kN, kK of the summed dimension at a time.
template <typename T, int kRows, int kColumns>
struct GemmSizes {
  using Product = TensorProduct<T, kRows, kColumns>;
  static constexpr int kK = 32, kStages = 4, kPad = 8, kResident = 2;
};
template <int kRows, int kColumns>
struct GemmSizes<float, kRows, kColumns> {
  using Product = PlainProduct<float, 64, 64>;
  static constexpr int kK = 16, kStages = 2, kPad = 4, kResident = 1;
};
template <int kRows, int kColumns>
struct GemmSizes<double, kRows, kColumns> {
  using Product = PlainProduct<double, 64, 64>;
  static constexpr int kK = 16, kStages = 2, kPad = 2, kResident = 1;
};

/// How both factors come to shared memory, summed dimension along their rows, and are multiplied.
template <typename T, int kRows, int kColumns>
struct Gemm : GemmSizes<T, kRows, kColumns> {
  using Sizes = GemmSizes<T, kRows, kColumns>;
  using typename Sizes::Product;
  static constexpr bool kAsyncReads = false;
  static constexpr int kStride = Sizes::kK + Sizes::kPad;
  template <int kTileRows>
  static constexpr int kTile = kTileRows * kStride;  // elements

  template <int kTileRows, typename Row>
  HEADWISE_DEVICE static void load(T* tile, const T* base, const Row& row, int columns,
                                   bool vectors) {
    load_tile<T, kTileRows, Sizes::kK, kStride, Product::kThreads>(tile, base, row, columns,
                                                                   vectors);
  }
  HEADWISE_DEVICE static void step(Product& product, const T* a, const T* b, Accumulator<T> scale) {
    product.template step<Sizes::kK, kStride, kStride, false>(a, b, scale);
  }
};

/// Two neighbouring elements of a row of `columns`, in one store where the address allows it.
template <typename T, typename C>
HEADWISE_DEVICE void store_pair(T* row, int64_t column, int64_t columns, C first, C second,
                                bool vectors) {
  if constexpr (kTensorCores<T>) {
    if (vectors && column + 1 < columns) {
      *reinterpret_cast<uint32_t*>(row + column) = pack<T>(first, second);
      return;
    }
  }
  if (column < columns) row[column] = static_cast<T>(first);
  if (column + 1 < columns) row[column + 1] = static_cast<T>(second);
}

}  // namespace headwise::kernels::cuda

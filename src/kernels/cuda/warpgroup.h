// Tiles of matrix products by warpgroups of Hopper (wgmma, compute capability 9.0a): the right
// factor is read from shared memory by the tensor cores themselves, the left one is in registers,
// where it can be scaled on its way. Two blocks per multiprocessor alternate, one waiting for its
// products while the other one's run.
#pragma once

#include "kernels/cuda/tile.h"

namespace headwise::kernels::cuda {

/// A block's product C [128, 128] += scale * A B by two warpgroups of 64 rows each, C in registers.
template <typename T>
struct WarpgroupProduct {
  static constexpr int kM = 128, kN = kWarpgroupColumns, kThreads = 256;
  float c[kN / 8][4] = {};
  int row;
  bool active;

  HEADWISE_DEVICE WarpgroupProduct(int64_t rows, int64_t)
      : row(warp_index() * 16), active(warp_index() / 4 * 64 < rows) {}  // the whole warpgroup

  /// A [128][64] and the columns of B [128][64] in swizzled rows.
  HEADWISE_DEVICE void step(const T* a, const T* b, float scale) {
    if (!active) return;
    uint32_t left[kSwizzledRow / 16][4];
    const int lane = lane_index(), r = row + lane % 16;
#pragma unroll
    for (int k = 0; k < kSwizzledRow / 16; ++k) {
      load_matrices(left[k], a + swizzled(r, 16 * k + lane / 16 * 8));
      if (scale != 1.f)
        for (int i = 0; i < 4; ++i) left[k][i] = scaled_pair<T>(left[k][i], scale);
    }
    warpgroup_multiply_accumulate<T>(c, left, b);
  }

  /// visit(row, column, value, value of the next column) of everything that this thread holds.
  template <typename Visit>
  HEADWISE_DEVICE void each(const Visit& visit) const {
    if (!active) return;
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        visit(row + g + 8 * half, 8 * n + 2 * t, c[n][2 * half], c[n][2 * half + 1]);
  }
};

/// Sizes of such products, in the terms of Gemm (tile.h). Rows are copied 16 bytes at a time.
template <typename T>
struct WarpgroupGemm {
  using Product = WarpgroupProduct<T>;
  static constexpr int kK = kSwizzledRow, kStages = 3, kResident = 2;
  static constexpr bool kAsyncReads = true;
  template <int kRows>
  static constexpr int kTile = kRows * kSwizzledRow;

  template <int kRows, typename Row>
  HEADWISE_DEVICE static void load(T* tile, const T* base, const Row& row, int columns, bool) {
    constexpr int kChunks = kSwizzledRow / 8;
#pragma unroll
    for (int n = thread_index(); n < kRows * kChunks; n += Product::kThreads) {
      const int r = n / kChunks, c = n % kChunks * 8;
      const T* from = row(r);
      int valid = from ? columns - c : 0;
      valid = valid < 0 ? 0 : smaller(valid, 8);
      copy_async(tile + swizzled(r, c), valid ? from + c : base,
                 valid * static_cast<int>(sizeof(T)));
    }
  }
  HEADWISE_DEVICE static void step(Product& product, const T* a, const T* b, float scale) {
    product.step(a, b, scale);
  }
};

}  // namespace headwise::kernels::cuda

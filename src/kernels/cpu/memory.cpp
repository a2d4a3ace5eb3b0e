#include "kernels/cpu/memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

namespace headwise::kernels {
namespace {

constexpr int64_t kLeastKept = 1 << 16;  // smaller blocks cost the system's allocator nothing

/// What a thread has freed, the last block last.
struct Kept {
  struct Block {
    std::byte* data;
    int64_t bytes;
  };
  std::vector<Block> blocks;
  int64_t bytes = 0;

  /// A block that fits and is not much larger; else none.
  std::byte* take(int64_t& wanted) {
    auto best = blocks.end();
    for (auto block = blocks.begin(); block != blocks.end(); ++block)
      if (block->bytes >= wanted && block->bytes <= 2 * wanted &&
          (best == blocks.end() || block->bytes < best->bytes))
        best = block;
    if (best == blocks.end()) return nullptr;
    std::byte* const data = best->data;
    bytes -= wanted = best->bytes;
    blocks.erase(best);
    return data;
  }
  void give(std::byte* data, int64_t size) {
    while (!blocks.empty() && bytes + size > Memory::kKeptBytes) {
      std::free(blocks.front().data);
      bytes -= blocks.front().bytes;
      blocks.erase(blocks.begin());
    }
    if (size > Memory::kKeptBytes) return std::free(data);
    blocks.push_back({data, size});
    bytes += size;
  }
  ~Kept() {
    for (const auto& block : blocks) std::free(block.data);
  }
};

thread_local Kept kept;

}  // namespace

Memory::Memory(int64_t bytes) : bytes_((std::max<int64_t>(bytes, 1) + kLine - 1) / kLine * kLine) {
  if (bytes_ >= kLeastKept) data_ = kept.take(bytes_);
  if (!data_) data_ = static_cast<std::byte*>(std::aligned_alloc(kLine, bytes_));
  if (!data_) throw std::bad_alloc();
}

Memory::~Memory() {
  if (!data_) return;
  if (bytes_ >= kLeastKept)
    kept.give(data_, bytes_);
  else
    std::free(data_);
}

}  // namespace headwise::kernels

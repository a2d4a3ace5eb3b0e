// Scratch memory of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace headwise::kernels {

constexpr int64_t kLine = 64;  // bytes of a cache line

/// Uninitialised memory at the beginning of a cache line. What a thread frees it keeps for its next
/// call, up to kKeptBytes: fresh memory of this size costs a page fault for every 4 KiB, up to a
/// fifth of a training step.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes);
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory();
  std::byte* data() const { return data_; }

  static constexpr int64_t kKeptBytes = int64_t(64) << 20;  // of a thread

 private:
  void swap(Memory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// n uninitialised elements.
template <typename T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t n) : memory_(n * int64_t(sizeof(T))) {}
  T* get() const { return reinterpret_cast<T*>(memory_.data()); }

 private:
  Memory memory_;
};

/// The same for `workers` tasks at once: the order in which BLAS sums may depend on where its
/// operands lie, and results should not depend on what else a process has allocated, nor on which
/// worker ran.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t size, int64_t workers)
      : bytes_((size * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine),
        memory_(bytes_ * workers) {}
  T* operator[](int64_t worker) const {
    return reinterpret_cast<T*>(memory_.data() + worker * bytes_);
  }

 private:
  int64_t bytes_;  // of one worker
  Memory memory_;
};

}  // namespace headwise::kernels

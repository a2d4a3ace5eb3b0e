// What compute-sanitizer would watch on a device: every access of a kernel to memory. kernels.cpp
// is compiled with -fsanitize=thread, whose calls before each load and store end here instead of in
// the sanitizer's own library. Found are
//   - races: two threads of a block touch one place of shared memory, or of a tensor, without a
//     barrier between them (a warp barrier, for threads of a warp), and one of them writes;
//     a copy that may still be under way counts as a write;
//   - blocks that write one place of a tensor, or read what another block of the launch wrote;
//   - accesses beside the shared memory of the block, or outside of every tensor.
#pragma once

#include <cstdint>

namespace headwise::emulator::memory {

/// True where kernels.cpp was compiled with those calls.
bool watched();

// A launch: its blocks one after another.
void launch_begins(unsigned char* shared, int64_t bytes, int64_t guard);
void block_begins(int64_t block, int threads);
void launch_ends();

/// This thread runs from here on, its local variables on that stack.
void runs(int thread, const unsigned char* stack, int64_t stack_bytes);
void passes_barrier(int thread);
void passes_warp_barrier(int thread);

void copy_begins(const void* to, const void* from, int bytes);
void copy_arrives(const void* to);

/// The first thing found since the launch began, or an empty string.
const char* found();

/// From here on new tensors begin as NaN, and accesses outside of all of them are found; or no
/// longer.
void watch_tensors(bool on);

}  // namespace headwise::emulator::memory

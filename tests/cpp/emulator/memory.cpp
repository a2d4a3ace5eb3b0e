#include "emulator/memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

// The first and the last byte of this library, whose constants kernels may read.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start;
extern "C" __attribute__((visibility("hidden"))) char _end;

namespace headwise::emulator::memory {
namespace {

constexpr int kLanes = 32, kMany = -1, kGranule = 2;  // bytes: the smallest elements

/// When an access was: barriers that its thread had passed.
struct Access {
  int32_t block = -1;  // of the launch; -1: never
  int16_t thread = kMany, warp = kMany;
  int32_t barriers = 0, warp_barriers = 0;
};
struct Place {
  Access write, read;
  bool arriving = false;  // a copy is under way
};

struct Range {
  uintptr_t begin = 0, size = 0;
  bool has(uintptr_t at, uintptr_t bytes) const {
    return at - begin < size && bytes <= begin + size - at;
  }
};

Range host_stack() {
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* begin = nullptr;
  size_t size = 0;
  pthread_attr_getstack(&attributes, &begin, &size);
  pthread_attr_destroy(&attributes);
  return {reinterpret_cast<uintptr_t>(begin), size};
}

// ---- Tensors. ----

struct Tensors {
  std::mutex lock;
  std::map<uintptr_t, uintptr_t> sizes;
  bool on = false;
};
Tensors& tensors() {
  static auto* const all = new Tensors;  // outlives every tensor
  return *all;
}

void release(void* data) {
  auto& all = tensors();
  {
    const std::lock_guard guard(all.lock);
    all.sizes.erase(reinterpret_cast<uintptr_t>(data));
  }
  c10::free_cpu(data);
}

struct Watched final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* const data = c10::alloc_cpu(size);
    auto& all = tensors();
    if (all.on && data) {
      std::memset(data, 0xff, size);
      const std::lock_guard guard(all.lock);
      all.sizes[reinterpret_cast<uintptr_t>(data)] = size;
    }
    return {data, data, &release, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

// ---- The launch. ----

struct State {
  bool active = false;
  int64_t block = 0;
  int thread = 0;
  std::vector<int32_t> barriers, warp_barriers;
  Range shared, guarded, stack, host;
  std::vector<Place> places;  // of shared memory
  std::unordered_map<uintptr_t, std::unique_ptr<std::array<Access, 2048>>> written;  // by page
  std::array<Range, 8> recent;                                                       // tensors
  size_t next_recent = 0;
  std::string found;
};
State state;

void report(const std::string& what) {
  if (!state.found.empty()) return;
  state.found = "thread " + std::to_string(state.thread) + " of block " +
                std::to_string(state.block) + ": " + what;
}

Access now() {
  const int t = state.thread;
  return {static_cast<int32_t>(state.block), static_cast<int16_t>(t),
          static_cast<int16_t>(t / kLanes), state.barriers[t], state.warp_barriers[t]};
}

/// True if `before` is sure to be over when `own` happens.
bool ordered(const Access& before, const Access& own) {
  if (before.block < 0) return true;
  if (before.block != own.block) return false;
  return before.barriers < own.barriers || before.thread == own.thread ||
         (before.warp == own.warp && before.warp_barriers < own.warp_barriers);
}

void add_read(Access& before, const Access& own) {
  const bool last = before.block == own.block && before.barriers == own.barriers &&
                    (before.warp != own.warp || before.warp_barriers == own.warp_barriers);
  if (!last || (before.thread == own.thread)) {
    before = own;
    return;
  }
  before.thread = kMany;
  if (before.warp != own.warp) before.warp = kMany;
  before.warp_barriers = std::max(before.warp_barriers, own.warp_barriers);
}

std::string by(const Access& before) {
  return before.thread == kMany ? "other threads" : "thread " + std::to_string(before.thread);
}

std::string byte(uintptr_t granule) {
  return " of byte " + std::to_string(granule * kGranule) + " of shared memory";
}

void shared_access(uintptr_t at, int64_t bytes, bool write, bool copy) {
  if (!state.shared.has(at, bytes)) {
    report("an access beside the shared memory of the block");
    return;
  }
  const auto own = now();
  const auto first = (at - state.shared.begin) / kGranule;
  const auto last = (at - state.shared.begin + bytes - 1) / kGranule;
  for (auto p = first; p <= last; ++p) {
    auto& place = state.places[p];
    if (place.arriving) {
      report("an access" + byte(p) + ", where a copy may still be under way");
    } else if (!ordered(place.write, own)) {
      report((write ? "a write" : "a read") + byte(p) + ", which " + by(place.write) +
             " wrote without a barrier since");
    } else if (write && !ordered(place.read, own)) {
      report("a write" + byte(p) + ", which " + by(place.read) + " read without a barrier since");
    }
    if (write)
      place.write = own, place.read = {};
    else
      add_read(place.read, own);
    place.arriving = copy;
  }
}

bool in_tensor(uintptr_t at, uintptr_t bytes) {
  for (const auto& range : state.recent)
    if (range.has(at, bytes)) return true;
  auto& all = tensors();
  const std::lock_guard guard(all.lock);
  auto next = all.sizes.upper_bound(at);
  if (next == all.sizes.begin()) return false;
  --next;
  const Range range{next->first, next->second};
  if (!range.has(at, bytes)) return false;
  state.recent[state.next_recent++ % state.recent.size()] = range;
  return true;
}

void global_access(uintptr_t at, int64_t bytes, bool write) {
  if (tensors().on && !in_tensor(at, bytes)) {
    const auto library = reinterpret_cast<uintptr_t>(&__ehdr_start);
    const Range own{library, reinterpret_cast<uintptr_t>(&_end) - library};
    // The kernel's own members, and constants.
    if (!write && (state.host.has(at, bytes) || own.has(at, bytes))) return;
    report(std::string(write ? "a write" : "a read") + " outside of every tensor");
    return;
  }
  const auto own = now();
  using Page = std::array<Access, 2048>;
  Page* page = nullptr;
  uintptr_t number = 0;
  for (uintptr_t p = at / kGranule; p * kGranule < at + bytes; ++p) {
    if (!page || p / 2048 != number) {
      number = p / 2048;
      const auto found = state.written.find(number);
      if (found == state.written.end() && !write) continue;
      auto& own_page = found == state.written.end() ? state.written[number] : found->second;
      if (!own_page) own_page = std::make_unique<Page>();
      page = own_page.get();
    }
    auto& before = (*page)[p % 2048];
    if (!ordered(before, own))
      report(std::string(write ? "a write" : "a read") + " of a tensor's element that " +
             by(before) + " of block " + std::to_string(before.block) +
             " wrote, with nothing to order them");
    if (write) before = own;
  }
}

void access(const void* address, int64_t bytes, bool write) {
  if (!state.active || bytes <= 0) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (state.stack.has(at, 1)) return;
  if (state.guarded.has(at, 1))
    shared_access(at, bytes, write, false);
  else
    global_access(at, bytes, write);
}

}  // namespace

bool watched() {
#ifdef HEADWISE_EMULATOR_WATCHES
  return true;
#else
  return false;
#endif
}

void launch_begins(unsigned char* shared, int64_t bytes, int64_t guard) {
  const auto begin = reinterpret_cast<uintptr_t>(shared);
  state.shared = {begin, static_cast<uintptr_t>(bytes)};
  state.guarded = {begin, static_cast<uintptr_t>(bytes + guard)};
  state.host = host_stack();
  state.written.clear();
  state.recent.fill({});
  state.found.clear();
}

void block_begins(int64_t block, int threads) {
  state.block = block;
  state.barriers.assign(threads, 0);
  state.warp_barriers.assign(threads, 0);
  state.places.assign(state.shared.size / kGranule + 1, {});
}

void launch_ends() { state.active = false; }

void runs(int thread, const unsigned char* stack, int64_t stack_bytes) {
  state.active = watched() && thread >= 0;
  state.thread = thread;
  state.stack = {reinterpret_cast<uintptr_t>(stack), static_cast<uintptr_t>(stack_bytes)};
}

void passes_barrier(int thread) { ++state.barriers[thread]; }
void passes_warp_barrier(int thread) { ++state.warp_barriers[thread]; }

void copy_begins(const void* to, const void* from, int bytes) {
  if (!watched()) return;
  access(from, bytes, false);
  shared_access(reinterpret_cast<uintptr_t>(to), 16, true, true);
}

void copy_arrives(const void* to) {
  if (!watched()) return;
  const auto own = now();
  const auto first = (reinterpret_cast<uintptr_t>(to) - state.shared.begin) / kGranule;
  for (uintptr_t p = first; p < first + 16 / kGranule; ++p) {
    state.places[p].write = own;
    state.places[p].arriving = false;
  }
}

const char* found() { return state.found.c_str(); }

void watch_tensors(bool on) {
  static Watched allocator;
  static const bool installed = [] {
    c10::SetCPUAllocator(&allocator, 1);
    return true;
  }();
  (void)installed;
  tensors().on = on && watched();
}

}  // namespace headwise::emulator::memory

// ---- What the compiler calls. ----

#define HEADWISE_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define HEADWISE_HOOKS(bytes)                            \
  HEADWISE_HOOK __tsan_read##bytes(void* p) {            \
    headwise::emulator::memory::access(p, bytes, false); \
  }                                                      \
  HEADWISE_HOOK __tsan_write##bytes(void* p) { headwise::emulator::memory::access(p, bytes, true); }
#define HEADWISE_UNALIGNED_HOOKS(bytes)                  \
  HEADWISE_HOOK __tsan_unaligned_read##bytes(void* p) {  \
    headwise::emulator::memory::access(p, bytes, false); \
  }                                                      \
  HEADWISE_HOOK __tsan_unaligned_write##bytes(void* p) { \
    headwise::emulator::memory::access(p, bytes, true);  \
  }
HEADWISE_HOOKS(1)
HEADWISE_HOOKS(2)
HEADWISE_HOOKS(4)
HEADWISE_HOOKS(8)
HEADWISE_HOOKS(16)
HEADWISE_UNALIGNED_HOOKS(2)
HEADWISE_UNALIGNED_HOOKS(4)
HEADWISE_UNALIGNED_HOOKS(8)
HEADWISE_UNALIGNED_HOOKS(16)
HEADWISE_HOOK __tsan_read_range(void* p, long bytes) {
  headwise::emulator::memory::access(p, bytes, false);
}
HEADWISE_HOOK __tsan_write_range(void* p, long bytes) {
  headwise::emulator::memory::access(p, bytes, true);
}
HEADWISE_HOOK __tsan_vptr_update(void**, void*) {}
HEADWISE_HOOK __tsan_vptr_read(void**) {}
HEADWISE_HOOK __tsan_func_entry(void*) {}
HEADWISE_HOOK __tsan_func_exit() {}
HEADWISE_HOOK __tsan_init() {}

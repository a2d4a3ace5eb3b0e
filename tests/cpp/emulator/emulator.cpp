#include "emulator/emulator.h"

#include <ucontext.h>
#include <csetjmp>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/memory.h"

namespace headwise::emulator {
namespace {

constexpr int kLanes = 32, kSlot = 128;
constexpr size_t kStack = 128 * 1024;
constexpr int64_t kAlign = 1024, kGuard = 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// Waiting: for the whole block, or for the warp.
enum class State { ready, barrier, warp, done };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  ucontext_t context;
  jmp_buf point;
  bool started = false;
  State state = State::ready;
  int meetings = 0;       // of its warp, this far
  bool unfenced = false;  // copies have arrived since its last fence
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> copies;
};

struct Warp {
  int arrived = 0, bytes = 0;  // of the lanes that wait, what each hands in
  // Two sets: a lane that has left a meeting may hand in for the next while others still read.
  alignas(16) unsigned char data[2][kLanes * kSlot];
};

struct Device {
  std::vector<Fiber> fibers;
  Warp warps[1024 / kLanes];
  std::vector<unsigned char> shared;  // with room to align it, and kGuard bytes behind it
  int64_t shared_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  int current = 0;
  int64_t block = 0;
  int threads = 0, waiting = 0;
  bool unfenced = false;  // of some thread, at the last barrier
  std::string error;
};

Device device;

void runs(int thread) { memory::runs(thread, device.fibers[thread].stack.get(), kStack); }

Fiber& self() { return device.fibers[device.current]; }

void fail(const std::string& what) {
  if (device.error.empty()) device.error = what;
}

// Back to the scheduler, until it is this fiber's turn again.
void leave() {
  if (_setjmp(self().point) == 0) _longjmp(device.scheduler, 1);
}

void entry() {
  (*device.kernel)();
  copy_wait(0);
  self().state = State::done;
  _longjmp(device.scheduler, 1);
}

void resume(int thread) {
  device.current = thread;
  runs(thread);
  if (_setjmp(device.scheduler)) return;
  auto& fiber = self();
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  setcontext(&fiber.context);
}

void run_block(std::mt19937& generator, std::vector<int>& order) {
  for (auto& fiber : device.fibers) {
    fiber.started = false, fiber.state = State::ready, fiber.meetings = 0;
    fiber.committed.clear(), fiber.copies.clear(), fiber.unfenced = false;
  }
  for (auto& warp : device.warps) warp.arrived = 0;
  std::fill(device.shared.begin(), device.shared.end(), 0xff);
  device.waiting = 0;
  const auto count = [](State state) {
    return std::count_if(device.fibers.begin(), device.fibers.begin() + device.threads,
                         [&](const Fiber& f) { return f.state == state; });
  };
  while (true) {
    std::shuffle(order.begin(), order.end(), generator);
    bool ran = false;
    for (int warp : order)
      for (bool again = true; again;) {  // one warp as far as it goes without the others
        again = false;
        const bool backwards = generator() & 1;
        for (int i = 0; i < kLanes; ++i) {
          const int thread = warp * kLanes + (backwards ? kLanes - 1 - i : i);
          if (device.fibers[thread].state != State::ready) continue;
          resume(thread);
          again = ran = true;
        }
      }
    const auto done = count(State::done);
    if (done == device.threads) {
      const auto* guard = shared() + device.shared_bytes;
      if (std::any_of(guard, guard + kGuard, [](unsigned char byte) { return byte != 0xff; }))
        fail("a write behind the shared memory of the block");
      return;
    }
    if (count(State::barrier) + done == device.threads) {
      if (done) fail("a thread left the kernel while others wait at a barrier");
      for (int t = 0; t < device.threads; ++t)
        if (device.fibers[t].state == State::barrier) {
          if (t == 0) device.unfenced = false;
          device.unfenced |= device.fibers[t].unfenced;
          device.fibers[t].state = State::ready;
          memory::passes_barrier(t);
        }
    } else if (!ran) {
      memory::launch_ends();
      throw std::runtime_error("emulator: the lanes of a warp do not meet");
    }
  }
}

}  // namespace

int thread() { return device.current; }
int64_t block() { return device.block; }
unsigned char* shared() {
  auto address = reinterpret_cast<uintptr_t>(device.shared.data());
  return reinterpret_cast<unsigned char*>((address + kAlign - 1) / kAlign * kAlign);
}

void barrier() {
  self().state = State::barrier;
  leave();
}

const unsigned char* exchange(const void* data, int bytes) {
  auto& fiber = self();
  auto& warp = device.warps[device.current / kLanes];
  auto* slots = warp.data[fiber.meetings++ % 2];
  if (bytes > kSlot) fail("exchange: too much data");
  if (warp.arrived && warp.bytes != bytes) fail("the lanes of a warp meet for different things");
  warp.bytes = bytes;
  std::memcpy(slots + kSlot * (device.current % kLanes), data, bytes);
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    const int first = device.current / kLanes * kLanes;
    for (int t = first; t < first + kLanes; ++t)
      if (device.fibers[t].state == State::warp) device.fibers[t].state = State::ready;
  } else {
    fiber.state = State::warp;
    leave();
  }
  if (bytes == 0) memory::passes_warp_barrier(device.current);
  return slots;
}

void check_aligned(const void* pointer, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    fail(std::string(what) + ": an address is not aligned to " + std::to_string(bytes) + " bytes");
}

void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to, 16, "copy_async");
  if (bytes) check_aligned(from, 16, "copy_async");
  if (bytes < 0 || bytes > 16) fail("copy_async: between 0 and 16 bytes");
  const auto* first = shared();
  const auto* at = static_cast<unsigned char*>(to);
  if (at < first || at + 16 > first + device.shared_bytes)
    fail("copy_async: not in the shared memory of the block");
  memory::copy_begins(to, from, bytes);
  std::memset(to, 0xff, 16);  // unreadable until it has arrived
  self().copies.push_back({to, from, bytes});
}

void async_read_fence() { self().unfenced = false; }

void check_async_reads() {
  if (device.unfenced) fail("tensor cores read what arrived without a fence");
}

void copy_commit() {
  self().committed.push_back(std::move(self().copies));
  self().copies.clear();
}

void copy_wait(int remaining) {
  auto& groups = self().committed;
  while (static_cast<int>(groups.size()) > remaining) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
      memory::copy_arrives(copy.to);
      self().unfenced = true;
    }
    groups.pop_front();
  }
}

void run(const std::function<void()>& kernel, int64_t blocks, int threads, int64_t shared_bytes) {
  if (blocks == 0) return;
  if (threads % kLanes || threads > 1024)
    throw std::runtime_error("emulator: a block has whole warps, at most 32");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("emulator: too much shared memory");
  device.threads = threads;
  while (static_cast<int>(device.fibers.size()) < threads) device.fibers.emplace_back();
  device.shared_bytes = shared_bytes;
  device.shared.assign(shared_bytes + kAlign + kGuard, 0xff);
  device.kernel = &kernel;
  device.error.clear();
  std::mt19937 generator(12345);
  std::vector<int> order(threads / kLanes);
  std::iota(order.begin(), order.end(), 0);
  memory::launch_begins(shared(), shared_bytes, kGuard);
  for (device.block = 0; device.block < blocks && device.error.empty(); ++device.block) {
    memory::block_begins(device.block, threads);
    run_block(generator, order);
    if (*memory::found()) fail(memory::found());
  }
  memory::launch_ends();
  device.kernel = nullptr;
  if (!device.error.empty()) throw std::runtime_error("emulator: " + device.error);
}

}  // namespace headwise::emulator

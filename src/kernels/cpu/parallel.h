// Tasks of uneven cost over LibTorch's thread pool.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP) && !defined(HEADWISE_SERIAL)
#error "without OpenMP's flags LibTorch's parallel_for, a template, runs on one thread"
#endif

#if defined(__SANITIZE_THREAD__)
#define HEADWISE_OWN_THREADS
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HEADWISE_OWN_THREADS
#endif
#endif
#ifdef HEADWISE_OWN_THREADS
#include <exception>
#include <thread>
#endif

namespace headwise::kernels {

inline constexpr int64_t kRowBlock = 128;  // rows of a matrix that a task takes at most
inline constexpr int64_t kTasksPerWorker =
    4;  // tasks differ in cost: several per worker even it out

/// f(worker) for every worker at once.
template <typename F>
void run_workers(int64_t workers, const F& f) {
#ifdef HEADWISE_OWN_THREADS
  // The thread sanitizer does not see how LibTorch's pool, which is not compiled with it, begins
  // and ends work: with separate threads it checks the tasks alone.
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> failed(workers);
  for (int64_t worker = 0; worker < workers; ++worker)
    threads.emplace_back([&, worker] {
      try {
        f(worker);
      } catch (...) {
        failed[worker] = std::current_exception();
      }
    });
  for (auto& thread : threads) thread.join();
  for (const auto& exception : failed)
    if (exception) std::rethrow_exception(exception);
#else
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(worker);
  });
#endif
}

/// f(task, worker) for every task in [0, tasks), handed out one at a time to whichever worker is
/// free; worker < at::get_num_threads() names scratch memory. f must not depend on who runs it.
template <typename F>
void parallel_tasks(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  const int64_t workers = std::min<int64_t>(tasks, at::get_num_threads());
  if (workers <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < tasks; ++i) f(i, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  run_workers(workers, [&](int64_t worker) {
    for (int64_t i = next++; i < tasks; i = next++) f(i, worker);
  });
}

/// Items in lists that may run at once: only items of the same list add to the same place, which is
/// place(item) >= 0.
template <typename F>
std::vector<std::vector<int64_t>> by_place(int64_t items, int64_t places, const F& place) {
  std::vector<std::vector<int64_t>> lists(places);
  for (int64_t n = 0; n < items; ++n) lists[place(n)].push_back(n);
  return lists;
}

}  // namespace headwise::kernels

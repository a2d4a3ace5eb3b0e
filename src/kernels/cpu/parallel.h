// Tasks of uneven cost over LibTorch's thread pool.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace headwise::kernels {

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
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next++; i < tasks; i = next++) f(i, worker);
  });
}

/// Items in lists that may run at once because items of one list alone share a place to add to:
/// place(item) >= 0 names it.
template <typename F>
std::vector<std::vector<int64_t>> by_place(int64_t items, int64_t places, const F& place) {
  std::vector<std::vector<int64_t>> lists(places);
  for (int64_t n = 0; n < items; ++n) lists[place(n)].push_back(n);
  return lists;
}

}  // namespace headwise::kernels

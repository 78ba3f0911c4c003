// SPDX-License-Identifier: Apache-2.0
// Parallel loops through a pool that the host program installs (torch's, when loaded by torch). Without one
// they run on the calling thread. Bodies must not throw and must write disjoint memory, or integers by
// atomic addition, so that results do not depend on the number of threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace bop2nd {

struct ThreadPool {
  // Calls body(begin, end, context) for parts of [0, n), each of at least `grain` iterations where possible.
  void (*parallel_for)(void* self, int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context);
  int (*n_threads)(void* self);
  void* self = nullptr;
};

void install_pool(const ThreadPool& pool);
// Of the calling thread: the one of its PoolScope, else the installed one.
const ThreadPool& pool();

// While it lives, loops of the calling thread run on that pool.
class PoolScope {
 public:
  explicit PoolScope(const ThreadPool* pool);
  ~PoolScope();
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;

 private:
  const ThreadPool* before_;
};

inline int n_threads_of(const ThreadPool& pool) { return pool.n_threads(pool.self); }

// body(begin, end) over static parts of [0, n).
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (n <= grain || n_threads_of(pool()) == 1) return body(int64_t{0}, n);
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  pool().parallel_for(pool().self, n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// body(task) for tasks of unequal cost: every thread takes the next one. With `serial`, on this thread.
template <class Body>
void parallel_tasks(int64_t n, bool serial, const Body& body) {
  int n_threads = serial ? 1 : n_threads_of(pool());
  if (n_threads == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_ranges(n_threads < n ? n_threads : n, 1, [&](int64_t begin, int64_t end) {
    (void)begin, (void)end;
    for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) body(i);
  });
}

// Loops over words (of 32 elements) take at least this many per thread: below, waking one costs more than it
// saves. And rows of so many words each.
constexpr int64_t kWordGrain = 1024;
inline int64_t row_grain(int64_t words_per_row) {
  int64_t rows = kWordGrain / (words_per_row > 1 ? words_per_row : 1);
  return rows > 1 ? rows : 1;
}

}  // namespace bop2nd

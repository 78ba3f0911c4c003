// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

namespace bop2nd::runtime {

WorkerPool::WorkerPool(int n_threads) : process_(getpid()), n_threads_(n_threads) {
  pool_.self = this;
  pool_.parallel_for = [](void* self, int64_t n, int64_t grain, Body body, void* context) {
    static_cast<WorkerPool*>(self)->run(n, grain, body, context);
  };
  pool_.n_threads = [](void* self) {
    const WorkerPool& pool = *static_cast<WorkerPool*>(self);
    return pool.n_threads_ == 1 || pool.forked() ? 1 : pool.n_threads_;
  };
  try {
    for (int part = 1; part < n_threads; ++part) threads_.emplace_back([this, part] { work(part); });
  } catch (...) {
    join();
    throw;
  }
}

WorkerPool::~WorkerPool() { join(); }

// A child process has no copy of the threads.
bool WorkerPool::forked() const { return getpid() != process_; }

void WorkerPool::join() {
  if (forked()) {
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    leaving_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::work(int64_t part) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    start_.wait(lock, [&] { return leaving_ || round_ != seen; });
    if (leaving_) return;
    seen = round_;
    if (part >= n_parts_) continue;
    int64_t n = n_, n_parts = n_parts_;
    Body body = body_;
    void* context = context_;
    lock.unlock();
    part_of(part, n, n_parts, body, context);
    lock.lock();
    if (--working_ == 0) end_.notify_one();
  }
}

// Bodies throw where memory runs out: the others still have to come to their end.
void WorkerPool::part_of(int64_t part, int64_t n, int64_t n_parts, Body body, void* context) {
  try {
    body(part * n / n_parts, (part + 1) * n / n_parts, context);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    thrown_ = std::current_exception();
  }
}

void WorkerPool::run(int64_t n, int64_t grain, Body body, void* context) {
  int64_t n_parts = std::min<int64_t>(n_threads_, n / std::max<int64_t>(1, grain));
  if (n_parts <= 1 || forked()) return body(0, n, context);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    n_ = n, n_parts_ = n_parts, body_ = body, context_ = context;
    working_ = static_cast<int>(n_parts) - 1;
    ++round_;
  }
  start_.notify_all();
  part_of(0, n, n_parts, body, context);
  std::unique_lock<std::mutex> lock(mutex_);
  end_.wait(lock, [&] { return working_ == 0; });
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
}

}  // namespace bop2nd::runtime

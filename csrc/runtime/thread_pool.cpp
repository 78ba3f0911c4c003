// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

namespace bop2nd::runtime {

WorkerPool::WorkerPool(int n_threads)
    : process_(getpid()), n_threads_(n_threads), shared_(std::make_unique<Shared>()) {
  pool_.self = this;
  pool_.parallel_for = [](void* self, int64_t n, int64_t grain, Body body, void* context) {
    static_cast<WorkerPool*>(self)->run(n, grain, body, context);
  };
  pool_.n_threads = [](void* self) {
    const WorkerPool& pool = *static_cast<WorkerPool*>(self);
    return pool.n_threads_ == 1 || pool.forked() ? 1 : pool.n_threads_;
  };
  try {
    for (int part = 1; part < n_threads; ++part) shared_->threads.emplace_back([this, part] { work(part); });
  } catch (...) {
    join();
    throw;
  }
}

WorkerPool::~WorkerPool() { join(); }

// A child process has no copy of the threads.
bool WorkerPool::forked() const { return getpid() != process_; }

void WorkerPool::join() {
  if (forked()) return static_cast<void>(shared_.release());  // its threads wait there for ever
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->leaving = true;
  }
  shared_->start.notify_all();
  for (std::thread& thread : shared_->threads) thread.join();
}

void WorkerPool::work(int64_t part) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(shared_->mutex);
  while (true) {
    shared_->start.wait(lock, [&] { return shared_->leaving || shared_->round != seen; });
    if (shared_->leaving) return;
    seen = shared_->round;
    if (part >= shared_->n_parts) continue;
    int64_t n = shared_->n, n_parts = shared_->n_parts;
    Body body = shared_->body;
    void* context = shared_->context;
    lock.unlock();
    part_of(part, n, n_parts, body, context);
    lock.lock();
    if (--shared_->working == 0) shared_->end.notify_one();
  }
}

// Bodies throw where memory runs out: the others still have to come to their end.
void WorkerPool::part_of(int64_t part, int64_t n, int64_t n_parts, Body body, void* context) {
  try {
    body(part * n / n_parts, (part + 1) * n / n_parts, context);
  } catch (...) {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->thrown = std::current_exception();
  }
}

void WorkerPool::run(int64_t n, int64_t grain, Body body, void* context) {
  int64_t n_parts = std::min<int64_t>(n_threads_, n / std::max<int64_t>(1, grain));
  if (n_parts <= 1 || forked()) return body(0, n, context);
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->n = n, shared_->n_parts = n_parts, shared_->body = body, shared_->context = context;
    shared_->working = static_cast<int>(n_parts) - 1;
    ++shared_->round;
  }
  shared_->start.notify_all();
  part_of(0, n, n_parts, body, context);
  std::unique_lock<std::mutex> lock(shared_->mutex);
  shared_->end.wait(lock, [&] { return shared_->working == 0; });
  if (shared_->thrown) std::rethrow_exception(std::exchange(shared_->thrown, nullptr));
}

}  // namespace bop2nd::runtime

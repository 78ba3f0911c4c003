// SPDX-License-Identifier: Apache-2.0
// A few threads that sleep until there is work; the caller works along. One caller at a time.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../cpu/parallel.h"

namespace bop2nd::runtime {

class WorkerPool {
 public:
  explicit WorkerPool(int n_threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // For the loops of csrc/cpu; lives as long as this.
  const ThreadPool& pool() const { return pool_; }

 private:
  using Body = void (*)(int64_t, int64_t, void*);

  // What threads wait on.
  struct Shared {
    std::mutex mutex;
    std::condition_variable start, end;
    uint64_t round = 0;
    int working = 0;
    bool leaving = false;
    int64_t n = 0, n_parts = 0;
    Body body = nullptr;
    void* context = nullptr;
    std::exception_ptr thrown;
    std::vector<std::thread> threads;
  };

  ThreadPool pool_;
  pid_t process_;
  int n_threads_;
  std::unique_ptr<Shared> shared_;

  void run(int64_t n, int64_t grain, Body body, void* context);
  void work(int64_t part);
  void part_of(int64_t part, int64_t n, int64_t n_parts, Body body, void* context);
  void join();
  bool forked() const;
};

}  // namespace bop2nd::runtime

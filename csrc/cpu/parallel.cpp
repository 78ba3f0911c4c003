// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

namespace bop2nd {
namespace {

void serial_for(void*, int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, n, context);
}
int one_thread(void*) { return 1; }

ThreadPool installed = {.parallel_for = serial_for, .n_threads = one_thread};
thread_local const ThreadPool* scoped = nullptr;

}  // namespace

void install_pool(const ThreadPool& pool) { installed = pool; }
const ThreadPool& pool() { return scoped ? *scoped : installed; }

PoolScope::PoolScope(const ThreadPool* pool) : before_(scoped) { scoped = pool; }
PoolScope::~PoolScope() { scoped = before_; }

}  // namespace bop2nd

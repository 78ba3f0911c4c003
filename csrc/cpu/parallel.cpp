// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

namespace bop2nd {
namespace {

void serial_for(int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, n, context);
}
int one_thread() { return 1; }

ThreadPool installed = {serial_for, one_thread};

}  // namespace

void install_pool(const ThreadPool& pool) { installed = pool; }
const ThreadPool& pool() { return installed; }

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// Plain C symbols for benchmarks and tests (ctypes). The loops only run; the caller takes the time.
#include <atomic>

#include "dispatch.h"
#include "parallel.h"

#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

// 1 if a parallel loop is shared by as many threads as the pool has (so always with one thread): the threads
// of a probe wait for each other for up to about 0.1 s.
BOP2ND_EXPORT int bop2nd_openmp(void) {
  int n_threads = bop2nd::n_threads_of(bop2nd::pool());
  std::atomic<int> arrived{0};
  std::atomic<bool> alone{false};
  bop2nd::parallel_ranges(n_threads, 1, [&](int64_t, int64_t) {
    arrived.fetch_add(1);
    for (int64_t spin = 0; arrived.load() < n_threads && spin < 100000000; ++spin) {
      if (alone.load()) return;
    }
    if (arrived.load() < n_threads) alone.store(true);
  });
  return arrived.load() == n_threads ? 1 : 0;
}

// Runs the counting of instruction set `id` on register operands, on the calling thread. Returns the number
// of binary multiply-accumulates done, 0 if this CPU cannot run it.
BOP2ND_EXPORT double bop2nd_register_loop(int id, int64_t iterations) {
  const bop2nd::InstructionSet* set = bop2nd::instruction_set(id);
  return set ? set->yardsticks.register_loop(iterations) : 0.0;
}

// Reads grad, m, v [n] of `element_bytes` (4 or 2) each and words [n / 32] and writes m, v and words, on all
// threads. n is a multiple of 32. Returns the bytes moved: (5 element_bytes + 0.25) n; 0 for other elements.
BOP2ND_EXPORT double bop2nd_bandwidth_loop(const void* grad, void* m, void* v, int32_t* words, int64_t n,
                                           int element_bytes) {
  if (element_bytes != 4 && element_bytes != 2) return 0.0;
  const bop2nd::YardstickTable& yardsticks = bop2nd::instruction_set(bop2nd_isa_active())->yardsticks;
  uint32_t* bits = reinterpret_cast<uint32_t*>(words);
  bop2nd::parallel_ranges(n / 32, 1024, [&](int64_t begin, int64_t end) {
    yardsticks.stream(static_cast<const float*>(grad), static_cast<float*>(m), static_cast<float*>(v), bits,
                      element_bytes, begin, end - begin);
  });
  return (5.0 * element_bytes + 0.25) * static_cast<double>(n / 32 * 32);
}

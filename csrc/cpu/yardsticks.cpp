// SPDX-License-Identifier: Apache-2.0
// Plain C symbols for benchmarks and tests (ctypes). The loops only run; the caller takes the time.
#include <algorithm>
#include <atomic>
#include <vector>

#include "isa_tables.h"
#include "parallel.h"

#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using bop2nd::YardstickTable;

#define BOP2ND_MAKER(name, training, code, needs, text) BOP2ND_IF_##code(bop2nd::name##_yardsticks),
constexpr bop2nd::Makers<YardstickTable> kMakers = {BOP2ND_INSTRUCTION_SETS(BOP2ND_MAKER)};
#undef BOP2ND_MAKER

const YardstickTable& yardsticks_of(int id) {
  static const auto tables = bop2nd::make_all<YardstickTable>(kMakers);
  return tables[static_cast<size_t>(id)];
}

}  // namespace

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
  return bop2nd_isa_supported(id) ? yardsticks_of(id).register_loop(iterations) : 0.0;
}

// Reads grads, ms, vs [n_weights[i]] of `grad_bytes` and `state_bytes` an element (4 and 4, 2 and 4, 2 and 2)
// and words [n_weights[i] / 32] of every tensor i and writes ms, vs and words as they were, on all threads,
// split among them as the step is. Returns the bytes moved; 0 for other elements. Sizes count in whole words.
BOP2ND_EXPORT double bop2nd_bandwidth_loop(int64_t n_tensors, const void* const* grads, void* const* ms,
                                           void* const* vs, int32_t* const* words, const int64_t* n_weights,
                                           int grad_bytes, int state_bytes) {
  bool known = state_bytes == 4 ? grad_bytes == 4 || grad_bytes == 2 : state_bytes == 2 && grad_bytes == 2;
  if (!known) return 0.0;
  const YardstickTable& yardsticks = yardsticks_of(bop2nd_isa_active());
  std::vector<int64_t> first(static_cast<size_t>(n_tensors) + 1, 0);
  for (size_t i = 0; i + 1 < first.size(); ++i) first[i + 1] = first[i] + n_weights[i] / 32;
  bop2nd::parallel_ranges(first.back(), 1024, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; begin < end; ++i) {
      int64_t stop = std::min(end, first[i + 1]);
      yardsticks.stream(grads[i], ms[i], vs[i], reinterpret_cast<uint32_t*>(words[i]), grad_bytes,
                        state_bytes, begin - first[i], stop - begin);
      begin = stop;
    }
  });
  return (grad_bytes + 4.0 * state_bytes + 0.25) * 32.0 * static_cast<double>(first.back());
}

// Reads `n_read` and writes `n_written` elements of 4 bytes, on all threads. Returns the bytes moved, of
// whole vectors.
BOP2ND_EXPORT double bop2nd_traffic_loop(const int32_t* read, int64_t n_read, int32_t* write,
                                         int64_t n_written) {
  const YardstickTable& yardsticks = yardsticks_of(bop2nd_isa_active());
  constexpr int64_t kPart = 1 << 14;  // of the longer array
  int64_t n_parts = (std::max(n_read, n_written) + kPart - 1) / kPart;
  auto at = [&](int64_t n, int64_t part) { return std::min(n, n * part / n_parts / 64 * 64); };
  bop2nd::parallel_ranges(n_parts, 2, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      int64_t r = at(n_read, part), w = at(n_written, part);
      yardsticks.traffic(reinterpret_cast<const uint32_t*>(read) + r, at(n_read, part + 1) - r,
                         reinterpret_cast<uint32_t*>(write) + w, at(n_written, part + 1) - w);
    }
  });
  return 4.0 * static_cast<double>(at(n_read, n_parts) + at(n_written, n_parts));
}

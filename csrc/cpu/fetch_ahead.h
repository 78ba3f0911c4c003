// SPDX-License-Identifier: Apache-2.0
// Prefetching for loops that walk long arrays once.
#pragma once

#include <cstdint>

#include "target.h"

namespace bop2nd {

// How far ahead of the loads memory is asked for: the processor's own prefetchers stop at every page. 64 M
// weights on one thread, bytes ahead: GB/s with fp32 state, with bf16 state. 0: 18.2, 15.1. 1024: 19.8, 18.2.
// 2048: 19.9, 18.4. 4096: 19.8, 17.5. Stores past the caches slowed the read/write loop down, from 19.2 to
// 15.4: what they would bypass has just been read. Timed once on a Cascade Lake server with this constant and
// the stores changed by hand; bench_core times what stands here.
constexpr int kAheadBytes = 2048;

// Asks for what n elements from p on will be followed by; past the end it does no harm.
template <class T>
BOP2ND_INLINE void fetch_ahead(const T* p, int n) {
  uintptr_t ahead = reinterpret_cast<uintptr_t>(p) + kAheadBytes;
  for (int i = 0; i < n * static_cast<int>(sizeof(T)); i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<uintptr_t>(i)));
  }
}

}  // namespace bop2nd

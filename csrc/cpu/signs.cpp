// SPDX-License-Identifier: Apache-2.0
// Whether dense values are all +1 or -1, at the speed of memory. A plain C symbol (ctypes): it is asked
// before steps on dense weights, which may have been written where no version counter tells.
#include <atomic>
#include <cstdint>

#include "parallel.h"

#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The sign is the highest bit: without it, every value must have the bits of +1.
template <class Bits>
bool all_signs(const Bits* values, int64_t n, Bits one) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  std::atomic<bool> all{true};
  bop2nd::parallel_ranges(n, 1 << 15, [&](int64_t begin, int64_t end) {
    Bits differs = 0;
    for (int64_t i = begin; i < end; ++i) differs |= static_cast<Bits>((values[i] & kMagnitude) ^ one);
    if (differs != 0) all.store(false, std::memory_order_relaxed);
  });
  return all.load();
}

}  // namespace

// `one`: the bits of +1 in the values' type, of `element_bytes` 4 or 2.
BOP2ND_EXPORT int bop2nd_all_signs(const void* values, int64_t n, int element_bytes, uint32_t one) {
  if (element_bytes == 4) return all_signs(static_cast<const uint32_t*>(values), n, one);
  return all_signs(static_cast<const uint16_t*>(values), n, static_cast<uint16_t>(one));
}

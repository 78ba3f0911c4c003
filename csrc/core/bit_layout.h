// SPDX-License-Identifier: Apache-2.0
// The bit layout: 32 elements to a word, element e of a row is bit e % 32 (least significant first) of
// word e / 32. Bit 1 means -1. Rows are padded to whole words and the padding bits are 0.
// Limits: no torch, no intrinsics; compiles for host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BOP2ND_HD __host__ __device__ __forceinline__
#else
#define BOP2ND_HD inline __attribute__((always_inline))
#endif

namespace bop2nd {

constexpr int kWordBits = 32;

BOP2ND_HD constexpr int64_t words_for(int64_t n_elements) {
  return n_elements / kWordBits + (n_elements % kWordBits > 0);
}

// Rows of `length` elements, each padded to `row_words()` words.
struct BitLayout {
  int64_t length;

  BOP2ND_HD constexpr int64_t row_words() const { return words_for(length); }
  BOP2ND_HD static constexpr int64_t word_of(int64_t element) { return element / kWordBits; }
  BOP2ND_HD static constexpr int bit_of(int64_t element) { return static_cast<int>(element % kWordBits); }
  // How many elements word `word` of a row holds: 32, fewer in the last one.
  BOP2ND_HD constexpr int elements_in(int64_t word) const {
    int64_t left = length - word * kWordBits;
    return left < kWordBits ? static_cast<int>(left) : kWordBits;
  }
};

// The lowest n bits set; n in 0..32.
BOP2ND_HD constexpr uint32_t low_bits(int n) { return n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1u; }

}  // namespace bop2nd

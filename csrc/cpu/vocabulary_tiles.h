// SPDX-License-Identifier: Apache-2.0
// What every vocabulary of tiles shares (tiles.inl): weight words of 16 outputs, in AVX-512 BW. Include
// inside a target region, after <immintrin.h>.
#pragma once

#include "kernels.h"
#include "target.h"

namespace bop2nd {

struct Avx512Tiles {
  using Words = __m512i;

  BOP2ND_INLINE static Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  BOP2ND_INLINE static Words bit_xor(Words a, Words b) { return _mm512_xor_si512(a, b); }
  // Bytes or halves of a and b in turn, from the lower or the upper half of each 16 bytes.
  BOP2ND_INLINE static Words low_bytes(Words a, Words b) { return _mm512_unpacklo_epi8(a, b); }
  BOP2ND_INLINE static Words high_bytes(Words a, Words b) { return _mm512_unpackhi_epi8(a, b); }
  BOP2ND_INLINE static Words low_halves(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
  BOP2ND_INLINE static Words high_halves(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }
  // Half a tile.
  BOP2ND_INLINE static void store_zeros(int8_t* to) {
    for (int i = 0; i < kTileBytes / 2; i += 64) _mm512_store_si512(to + i, _mm512_setzero_si512());
  }
  // Bits of a word in the order of its bytes: bit 4 t + k is bit 8 k + t.
  BOP2ND_INLINE static uint32_t ordered(uint32_t word) {
    return _pdep_u32(word, 0x11111111u) | _pdep_u32(word >> 8, 0x22222222u) |
           _pdep_u32(word >> 16, 0x44444444u) | _pdep_u32(word >> 24, 0x88888888u);
  }
};

}  // namespace bop2nd

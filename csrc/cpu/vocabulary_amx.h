// SPDX-License-Identifier: Apache-2.0
// The vocabulary of tiles in AMX-INT8, with GFNI and AVX-512 VBMI for unpacking bits to bytes. Include inside
// a target region, after <immintrin.h>.
#pragma once

#include "vocabulary_tiles.h"

namespace bop2nd {

struct AmxTiles : Avx512Tiles {
  // Bit t of every byte, spread: +1 where it is 0, -1 where it is 1.
  template <int t>
  BOP2ND_INLINE static void store_row(int8_t* rows, Words words) {
    // Bits 1..7 of a result byte take bit t, bit 0 takes none, and is inverted.
    Words select = _mm512_set1_epi64(0x0001010101010101ll << t);
    _mm512_store_si512(rows + 64 * t, _mm512_gf2p8affine_epi64_epi8(words, select, 1));
  }
  // Two words of activations, in order.
  BOP2ND_INLINE static void store_pixels(int8_t* to, const uint32_t* x) {
    uint64_t bits;
    std::memcpy(&bits, x, sizeof(bits));
    Words signs = _mm512_or_si512(_mm512_movm_epi8(bits), _mm512_set1_epi8(1));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi8(order(), signs));
  }
  // 64 bytes, in place.
  BOP2ND_INLINE static void order_bytes(int8_t* bytes) {
    _mm512_storeu_si512(bytes, _mm512_permutexvar_epi8(order(), _mm512_loadu_si512(bytes)));
  }
  // One word; bytes outside of `valid` become 0.
  BOP2ND_INLINE static void store_pixel(int8_t* to, uint32_t word, uint32_t valid) {
    __m256i signs = _mm256_or_si256(_mm256_movm_epi8(ordered(word)), _mm256_set1_epi8(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_mov_epi8(valid, signs));
  }

  // All eight tiles are 16 rows of 64 bytes. They belong to the thread, until released.
  BOP2ND_INLINE static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  BOP2ND_INLINE static void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int kTile>
  BOP2ND_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  BOP2ND_INLINE static void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  BOP2ND_INLINE static void store_tile(int32_t* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(kTile) : "memory");
  }
  // sum += x w, of signed bytes.
  template <int kSum, int kX, int kW>
  BOP2ND_INLINE static void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kW));
  }

 private:
  BOP2ND_INLINE static Words order() {
    return _mm512_setr_epi32(0x18100800, 0x19110901, 0x1A120A02, 0x1B130B03, 0x1C140C04, 0x1D150D05,
                             0x1E160E06, 0x1F170F07, 0x38302820, 0x39312921, 0x3A322A22, 0x3B332B23,
                             0x3C342C24, 0x3D352D25, 0x3E362E26, 0x3F372F27);
  }
};

}  // namespace bop2nd

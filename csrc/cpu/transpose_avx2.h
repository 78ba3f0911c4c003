// SPDX-License-Identifier: Apache-2.0
// Transposition of bits and of floats in AVX2, for AVX-512 as well. Include inside a target region, after
// <immintrin.h>.
#pragma once

#include "target.h"

namespace bop2nd {

// What the vocabularies of AVX2 and AVX-512 share.
struct Avx2Transposes {
  static constexpr int kBlock = 8;

  // to[i]: bit i of 32 words. Bytes of one significance are brought side by side, in the order of the words;
  // then the uppermost bits of 32 bytes are one instruction's work.
  BOP2ND_INLINE static void transpose_words(const uint32_t* words, uint32_t* to) {
    __m256i by_byte =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i part[4];  // words 4 i .. 4 i + 3, and those 16 further
    for (int i = 0; i < 4; ++i) {
      const __m128i* from = reinterpret_cast<const __m128i*>(words + 4 * i);
      part[i] = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(from)),
                                                            _mm_loadu_si128(from + 4), 1),
                                    by_byte);
    }
    __m256i first = _mm256_unpacklo_epi32(part[0], part[1]), second = _mm256_unpacklo_epi32(part[2], part[3]);
    __m256i third = _mm256_unpackhi_epi32(part[0], part[1]), fourth = _mm256_unpackhi_epi32(part[2], part[3]);
    __m256i bytes[4] = {_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second),
                        _mm256_unpacklo_epi64(third, fourth), _mm256_unpackhi_epi64(third, fourth)};
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 8
      for (int bit = 7; bit >= 0; --bit) {
        to[8 * byte + bit] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes[byte]));
        bytes[byte] = _mm256_add_epi8(bytes[byte], bytes[byte]);
      }
    }
  }

  // to[column][row] = from[row][column], 8 by 8.
  BOP2ND_INLINE static void transpose_block(const float* from, int64_t from_stride, float* to,
                                            int64_t to_stride) {
    __m256 four[8];  // element i: columns i and 4 + i of rows 0 .. 3, or i - 4 and i of rows 4 .. 7
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256 row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) row[i] = _mm256_loadu_ps(from + (4 * half + i) * from_stride);
      __m256 low01 = _mm256_unpacklo_ps(row[0], row[1]), high01 = _mm256_unpackhi_ps(row[0], row[1]);
      __m256 low23 = _mm256_unpacklo_ps(row[2], row[3]), high23 = _mm256_unpackhi_ps(row[2], row[3]);
      four[4 * half] = _mm256_shuffle_ps(low01, low23, 0x44),
               four[4 * half + 1] = _mm256_shuffle_ps(low01, low23, 0xEE);
      four[4 * half + 2] = _mm256_shuffle_ps(high01, high23, 0x44),
                      four[4 * half + 3] = _mm256_shuffle_ps(high01, high23, 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(four[i], four[4 + i], 0x20));
      _mm256_storeu_ps(to + (4 + i) * to_stride, _mm256_permute2f128_ps(four[i], four[4 + i], 0x31));
    }
  }
};

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// The vocabulary in AVX2 and F16C. Include inside a target region, after <immintrin.h> and <cstring>.
#pragma once

#include "../core/rounding.h"
#include "kernels.h"
#include "target.h"
#include "transpose_avx2.h"

namespace bop2nd {

struct Avx2Lanes : Avx2Transposes {
  static constexpr int kLanes = 8;
  static constexpr bool kPairs = true;  // see load_pairs
  using F = __m256;
  using I = __m256i;
  using M = __m256i;     // all ones or all zeros per lane
  using Set = uint32_t;  // a bit per lane
  static constexpr bool kScreens = true;

  BOP2ND_INLINE static F setf(float x) { return _mm256_set1_ps(x); }
  BOP2ND_INLINE static F add(F a, F b) { return _mm256_add_ps(a, b); }
  BOP2ND_INLINE static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  BOP2ND_INLINE static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static constexpr int kRealVectors = 2, kRealPixels = 6;
  BOP2ND_INLINE static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  BOP2ND_INLINE static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  BOP2ND_INLINE static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  BOP2ND_INLINE static F flip_sign(F a, M m) {
    return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(m, 31)));
  }
  BOP2ND_INLINE static F keep(F a, M m) { return _mm256_and_ps(a, _mm256_castsi256_ps(m)); }
  BOP2ND_INLINE static M less_zero(F a) { return compare<_CMP_LT_OQ>(a, _mm256_setzero_ps()); }
  BOP2ND_INLINE static M greater(F a, F b) { return compare<_CMP_GT_OQ>(a, b); }
  BOP2ND_INLINE static M at_most(F a, F b) { return compare<_CMP_LE_OQ>(a, b); }
  BOP2ND_INLINE static M not_less(F a, F b) { return compare<_CMP_NLT_UQ>(a, b); }
  BOP2ND_INLINE static Set bits(M a) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a)));
  }
  BOP2ND_INLINE static Set same(Set a, Set b) { return ~(a ^ b) & 0xFFu; }
  BOP2ND_INLINE static Set both(Set a, Set b) { return a & b; }
  BOP2ND_INLINE static bool none(Set a) { return a == 0; }
  BOP2ND_INLINE static M from_bits(uint32_t bits) {
    I lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(set1(bits), lane), lane);
  }

  BOP2ND_INLINE static I set1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  BOP2ND_INLINE static I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  BOP2ND_INLINE static I load_int(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  BOP2ND_INLINE static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  BOP2ND_INLINE static I mul_int(I a, I b) { return _mm256_mullo_epi32(a, b); }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  BOP2ND_INLINE static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  BOP2ND_INLINE static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  BOP2ND_INLINE static I xor_and(I a, I b, I mask) { return bit_and(bit_xor(a, b), mask); }
  template <int n>
  BOP2ND_INLINE static I shift_right(I a) {
    return _mm256_srli_epi32(a, n);
  }
  BOP2ND_INLINE static M equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
  BOP2ND_INLINE static I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
  BOP2ND_INLINE static I as_int(F a) { return _mm256_castps_si256(a); }
  BOP2ND_INLINE static F as_float(I a) { return _mm256_castsi256_ps(a); }

  BOP2ND_INLINE static I look_up(const uint32_t* table, I index) {
    I low = _mm256_permutevar8x32_epi32(load_int(table), index);
    I high = _mm256_permutevar8x32_epi32(load_int(table + 8), index);
    return as_int(_mm256_blendv_ps(as_float(low), as_float(high), as_float(_mm256_slli_epi32(index, 28))));
  }

  // n <= 0 reads nothing, n >= 8 reads all lanes; lanes not read are 0.
  BOP2ND_INLINE static F load(const float* p, int n) {
    if (n >= kLanes) return _mm256_loadu_ps(p);
    return _mm256_maskload_ps(p, first(n));
  }
  BOP2ND_INLINE static F load(const BFloat16* p, int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p, n)), 16));
  }
  BOP2ND_INLINE static F load(const Float16* p, int n) { return _mm256_cvtph_ps(load16(p, n)); }
  BOP2ND_INLINE static void store(float* p, F a, int n) {
    if (n >= kLanes) return _mm256_storeu_ps(p, a);
    _mm256_maskstore_ps(p, first(n), a);
  }
  BOP2ND_INLINE static void store(BFloat16* p, F a, int n) {
    I bits = as_int(a);
    I odd = bit_and(shift_right<16>(bits), set1(1));
    I rounded = add_int(bits, add_int(odd, set1(0x7FFF)));
    M nan = compare<_CMP_UNORD_Q>(a, a);
    store_low16(p, shift_right<16>(select(nan, bit_or(bits, set1(0x00400000u)), rounded)), n);
  }
  BOP2ND_INLINE static void store(Float16* p, F a, int n) {
    store16(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
  }
  BOP2ND_INLINE static void store_low16(BFloat16* p, I a, int n) {
    __m128i low = _mm256_castsi256_si128(a), high = _mm256_extracti128_si256(a, 1);
    __m128i mask = _mm_set1_epi32(0xFFFF);
    store16(p, _mm_packus_epi32(_mm_and_si128(low, mask), _mm_and_si128(high, mask)), n);
  }

  // Pairs: 16 neighbouring elements as two vectors, those of even and those of odd position.
  BOP2ND_INLINE static void load_pairs(const BFloat16* p, F& even, F& odd) {
    I x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    odd = _mm256_castsi256_ps(bit_and(x, set1(0xFFFF0000u)));
  }
  template <class T>
  BOP2ND_INLINE static void load_pairs(const T* p, F& even, F& odd) {
    F a = load(p, kLanes), b = load(p + kLanes, kLanes);
    even = unlace(_mm256_shuffle_ps(a, b, 0x88));
    odd = unlace(_mm256_shuffle_ps(a, b, 0xDD));
  }
  // The high halves of the lanes.
  BOP2ND_INLINE static void store_pairs(BFloat16* p, I even, I odd) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(shift_right<16>(even), odd, 0xAA));
  }
  // Without pdep, which takes hundreds of cycles on Zen 1 and 2.
  BOP2ND_INLINE static uint32_t pair_bits(M even, M odd) {
    __m256i halves = _mm256_blend_epi16(even, odd, 0xAA);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
  // Whether no lane is infinite or NaN.
  BOP2ND_INLINE static bool all_finite(F a) {
    return _mm256_movemask_ps(_mm256_cmp_ps(abs(a), setf(__builtin_inff()), _CMP_NLT_UQ)) == 0;
  }

 private:
  BOP2ND_INLINE static F unlace(F a) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xD8));
  }
  template <int predicate>
  BOP2ND_INLINE static M compare(F a, F b) {
    return _mm256_castps_si256(_mm256_cmp_ps(a, b, predicate));
  }
  BOP2ND_INLINE static M first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota()); }
  BOP2ND_INLINE static __m128i load16(const void* p, int n) {
    if (n >= kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(p));
    __m128i a = _mm_setzero_si128();
    if (n > 0) std::memcpy(&a, p, 2 * static_cast<unsigned>(n));
    return a;
  }
  BOP2ND_INLINE static void store16(void* p, __m128i a, int n) {
    if (n >= kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), a);
    if (n > 0) std::memcpy(p, &a, 2 * static_cast<unsigned>(n));
  }
};

// What signed_bytes.inl takes besides. Pairs of products are at most 510, so that 64 of them fit 16 bits.
struct Avx2Bytes : Avx2Lanes {
  static constexpr int kRows = 2, kSteps = 64;

  template <int nibble>
  BOP2ND_INLINE static I spread_signs(I words) {
    constexpr int b = nibble / 2 * 0x01010101, first = 1 << (4 * (nibble % 2));
    constexpr int next = 0x04040404;
    I bytes = _mm256_shuffle_epi8(words, _mm256_setr_epi32(b, b + next, b + 2 * next, b + 3 * next, b,
                                                           b + next, b + 2 * next, b + 3 * next));
    I bit = set1(0x08040201u * static_cast<uint32_t>(first));
    return bit_or(_mm256_cmpeq_epi8(bit_and(bytes, bit), bit), _mm256_set1_epi8(1));
  }
  BOP2ND_INLINE static void add_products(I& sums, I x, I w) {
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(x, w));
  }
  BOP2ND_INLINE static I whole(I sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
};

struct Avx2Count {
  using Lanes = Avx2Lanes;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kPixels = 1;
  static constexpr bool kCountsBytes = false;  // see count_bytes.inl

  BOP2ND_INLINE static I set1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  BOP2ND_INLINE static I load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  BOP2ND_INLINE static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  BOP2ND_INLINE static I xor_word(I a, const uint32_t* x) { return bit_xor(a, set1(*x)); }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  // plane + a + b = plane + 2 carry.
  BOP2ND_INLINE static void full_add(I& plane, I a, I b, I& carry) {
    I differ = bit_xor(a, b);
    carry = _mm256_or_si256(bit_and(differ, plane), _mm256_andnot_si256(differ, a));
    plane = bit_xor(plane, differ);
  }
  // The same for a = w0 ^ x[0] and b = a ^ w1 ^ x[1]; see matmul.inl on pairs.
  BOP2ND_INLINE static void pair_add(I& plane, I w0, I w1, const uint32_t* x, I& carry) {
    I a = xor_word(w0, x), differ = xor_word(w1, x + 1);
    carry = _mm256_or_si256(bit_and(differ, plane), _mm256_andnot_si256(differ, a));
    plane = bit_xor(plane, differ);
  }
  // Popcounts of bytes, times 1 << kPlane.
  template <int kPlane>
  BOP2ND_INLINE static I byte_counts(I a) {
    constexpr char k1 = 1 << kPlane, k2 = 2 << kPlane, k3 = 3 << kPlane, k4 = static_cast<char>(4 << kPlane);
    I table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, k1, k1, k2, k1, k2, k2, k3, k1, k2, k2, k3, k2, k3, k3, k4));
    I low = _mm256_set1_epi8(15);
    I high = bit_and(_mm256_srli_epi32(a, 4), low);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, bit_and(a, low)), _mm256_shuffle_epi8(table, high));
  }
  BOP2ND_INLINE static I add_bytes(I a, I b) { return _mm256_add_epi8(a, b); }
  BOP2ND_INLINE static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  // sums[v], lane 4 l + i: low + 32 high, summed over the bytes of lane 4 v + i of the l-th 16 bytes.
  template <int L>
  BOP2ND_INLINE static void sum_lanes(I low, I high, I (&sums)[32 / L]) {
    I ones = _mm256_set1_epi8(1), zero = set1(0);
    if constexpr (L == 8) {
      I weights = _mm256_set1_epi16(32 << 8 | 1);
      I first = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), weights);
      I second = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), weights);
      sums[0] = _mm256_unpacklo_epi16(first, zero);
      sums[1] = _mm256_unpackhi_epi16(first, zero);
      sums[2] = _mm256_unpacklo_epi16(second, zero);
      sums[3] = _mm256_unpackhi_epi16(second, zero);
    } else {
      I halves =
          _mm256_add_epi16(_mm256_maddubs_epi16(low, ones), _mm256_maddubs_epi16(high, _mm256_set1_epi8(32)));
      if constexpr (L == 16) {
        sums[0] = _mm256_unpacklo_epi16(halves, zero);
        sums[1] = _mm256_unpackhi_epi16(halves, zero);
      } else {
        sums[0] = _mm256_madd_epi16(halves, _mm256_set1_epi16(1));
      }
    }
  }
  // The first n words at `from`, each as 32 / L words that repeat one of its parts of L bits. Reads no more.
  template <int L>
  BOP2ND_INLINE static I spread(const uint32_t* from, int n) {
    I lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), Avx2Lanes::iota());
    if constexpr (L == 32) return _mm256_maskload_epi32(reinterpret_cast<const int*>(from), lanes);
    __m128i words = _mm_maskload_epi32(reinterpret_cast<const int*>(from), _mm256_castsi256_si128(lanes));
    if constexpr (L == 8) return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(words), set1(0x01010101u));
    I halves = _mm256_cvtepu16_epi32(words);
    return _mm256_or_si256(halves, _mm256_slli_epi32(halves, 16));
  }
  // Odd lanes become their exclusive or with the lane before.
  BOP2ND_INLINE static I make_pairs(I a) { return bit_xor(a, _mm256_slli_epi64(a, 32)); }
  BOP2ND_INLINE static I dot(I bias, I count) { return _mm256_sub_epi32(bias, add(count, count)); }
  BOP2ND_INLINE static Lanes::F real(I a) { return _mm256_cvtepi32_ps(a); }
  BOP2ND_INLINE static uint32_t less(I a, const int32_t* threshold, int n) {
    const __m256i* all = reinterpret_cast<const __m256i*>(threshold);
    if (n >= kLanes) return Avx2Lanes::bits(_mm256_cmpgt_epi32(_mm256_loadu_si256(all), a));
    I lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), Avx2Lanes::iota());
    I below = _mm256_cmpgt_epi32(_mm256_maskload_epi32(threshold, lanes), a);
    return Avx2Lanes::bits(_mm256_and_si256(below, lanes));
  }
  BOP2ND_INLINE static void keep_in_register(I& a) { asm volatile("" : "+x"(a)); }
};

// What lookup.inl takes besides: bytes, 16-bit halves of 32-bit lanes, tables of 16 bytes.
struct Avx2Lookup : Avx2Count {
  using Words = __m128i;
  static constexpr int kBytes = 32;

  BOP2ND_INLINE static I zero() { return _mm256_setzero_si256(); }
  BOP2ND_INLINE static I set_halves(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  BOP2ND_INLINE static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  BOP2ND_INLINE static void store(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  BOP2ND_INLINE static I add_halves(I a, I b) { return _mm256_add_epi16(a, b); }
  BOP2ND_INLINE static I sub_halves(I a, I b) { return _mm256_sub_epi16(a, b); }
  BOP2ND_INLINE static I sub_bytes(I a, I b) { return _mm256_sub_epi8(a, b); }
  // Of halves.
  template <int n>
  BOP2ND_INLINE static I shift_left(I a) {
    return _mm256_slli_epi16(a, n);
  }
  template <int n>
  BOP2ND_INLINE static I shift_right(I a) {
    return _mm256_srli_epi16(a, n);
  }

  // The same 16 bytes for all outputs.
  BOP2ND_INLINE static I load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // The bytes of the table at 32 indices below 16.
  BOP2ND_INLINE static I look_up(I table, const uint8_t* indices) {
    return _mm256_shuffle_epi8(table, load(indices));
  }

  // The low and the high 4 bits of every byte.
  BOP2ND_INLINE static I low_nibbles(I a) { return bit_and(a, _mm256_set1_epi8(15)); }
  BOP2ND_INLINE static I high_nibbles(I a) { return low_nibbles(shift_right<4>(a)); }
  // The low and the high bytes of the halves of a and b, of either 16 bytes side by side.
  BOP2ND_INLINE static I low_bytes(I a, I b) {
    I low = set_halves(0x00FF);
    return _mm256_packus_epi16(bit_and(a, low), bit_and(b, low));
  }
  BOP2ND_INLINE static I high_bytes(I a, I b) {
    return _mm256_packus_epi16(shift_right<8>(a), shift_right<8>(b));
  }
  // The halves of the low or high 8 bytes of either 16 bytes, of even and odd by turns.
  BOP2ND_INLINE static I unpack_low(I even, I odd) { return _mm256_unpacklo_epi16(even, odd); }
  BOP2ND_INLINE static I unpack_high(I even, I odd) { return _mm256_unpackhi_epi16(even, odd); }
  BOP2ND_INLINE static void widen(I halves, I& low, I& high) {
    low = _mm256_unpacklo_epi16(halves, zero()), high = _mm256_unpackhi_epi16(halves, zero());
  }

  // The first n words, at most 4, others 0.
  BOP2ND_INLINE static Words load_words(const uint32_t* p, int n) {
    if (n == 4) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_maskload_epi32(reinterpret_cast<const int*>(p),
                              _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3)));
  }
  // For every 4 bits of a and b, in order: 2 (a + 16 b).
  BOP2ND_INLINE static void store_offsets(uint16_t* to, Words a, Words b) {
    __m128i low = _mm_set1_epi8(15), high = _mm_set1_epi8(static_cast<char>(0xF0));
    __m128i even = _mm_or_si128(_mm_and_si128(a, low), _mm_and_si128(_mm_slli_epi16(b, 4), high));
    __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(a, 4), low), _mm_and_si128(b, high));
    I first = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
    I second = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd));
    store(to, add_halves(first, first)), store(to + 16, add_halves(second, second));
  }
};

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// The vocabulary in AVX-512 F, BW, VL, DQ. Include inside a target region, after <immintrin.h>.
#pragma once

#include "../core/rounding.h"
#include "kernels.h"
#include "target.h"
#include "transpose_avx2.h"

namespace bop2nd {

struct Avx512Lanes : Avx2Transposes {
  static constexpr int kLanes = 16;
  static constexpr bool kPairs = true;  // see load_pairs
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;
  using Set = uint32_t;  // a bit per lane
  static constexpr bool kScreens = true;

  BOP2ND_INLINE static F setf(float x) { return _mm512_set1_ps(x); }
  BOP2ND_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
  BOP2ND_INLINE static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  BOP2ND_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static constexpr int kRealVectors = 4, kRealPixels = 6;
  BOP2ND_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  BOP2ND_INLINE static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  BOP2ND_INLINE static F abs(F a) { return _mm512_abs_ps(a); }
  BOP2ND_INLINE static F flip_sign(F a, M m) { return _mm512_mask_xor_ps(a, m, a, _mm512_set1_ps(-0.0f)); }
  BOP2ND_INLINE static F keep(F a, M m) { return _mm512_maskz_mov_ps(m, a); }
  BOP2ND_INLINE static M less_zero(F a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ); }
  BOP2ND_INLINE static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  BOP2ND_INLINE static M at_most(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  BOP2ND_INLINE static M not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  BOP2ND_INLINE static Set bits(M a) { return a; }
  BOP2ND_INLINE static Set same(Set a, Set b) { return ~(a ^ b) & 0xFFFFu; }
  BOP2ND_INLINE static Set both(Set a, Set b) { return a & b; }
  BOP2ND_INLINE static bool none(Set a) { return a == 0; }
  BOP2ND_INLINE static M from_bits(uint32_t bits) { return static_cast<M>(bits); }

  BOP2ND_INLINE static I set1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  BOP2ND_INLINE static I iota() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  BOP2ND_INLINE static I load_int(const uint32_t* p) { return _mm512_loadu_si512(p); }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
  BOP2ND_INLINE static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  BOP2ND_INLINE static I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  BOP2ND_INLINE static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  BOP2ND_INLINE static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  BOP2ND_INLINE static I xor_and(I a, I b, I mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0x28); }
  template <int n>
  BOP2ND_INLINE static I shift_right(I a) {
    return _mm512_srli_epi32(a, n);
  }
  BOP2ND_INLINE static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  BOP2ND_INLINE static I select(M m, I yes, I no) { return _mm512_mask_mov_epi32(no, m, yes); }
  BOP2ND_INLINE static I as_int(F a) { return _mm512_castps_si512(a); }
  BOP2ND_INLINE static F as_float(I a) { return _mm512_castsi512_ps(a); }

  BOP2ND_INLINE static I look_up(const uint32_t* table, I index) {
    return _mm512_permutexvar_epi32(index, load_int(table));
  }

  // n <= 0 reads nothing, n >= 16 reads all lanes; lanes not read are 0.
  BOP2ND_INLINE static F load(const float* p, int n) {
    if (n >= kLanes) return _mm512_loadu_ps(p);
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  BOP2ND_INLINE static F load(const BFloat16* p, int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(p, n)), 16));
  }
  BOP2ND_INLINE static F load(const Float16* p, int n) { return _mm512_cvtph_ps(load16(p, n)); }
  BOP2ND_INLINE static void store(float* p, F a, int n) {
    if (n >= kLanes) return _mm512_storeu_ps(p, a);
    _mm512_mask_storeu_ps(p, first(n), a);
  }
  BOP2ND_INLINE static void store(BFloat16* p, F a, int n) {
    I bits = as_int(a);
    I odd = bit_and(shift_right<16>(bits), set1(1));
    I rounded = add_int(bits, add_int(odd, set1(0x7FFF)));
    M nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    store_low16(p, shift_right<16>(select(nan, bit_or(bits, set1(0x00400000u)), rounded)), n);
  }
  BOP2ND_INLINE static void store(Float16* p, F a, int n) {
    store16(p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
  }
  BOP2ND_INLINE static void store_low16(BFloat16* p, I a, int n) { store16(p, _mm512_cvtepi32_epi16(a), n); }

  // Pairs: 32 neighbouring elements as two vectors, those of even and those of odd position.
  BOP2ND_INLINE static void load_pairs(const BFloat16* p, F& even, F& odd) {
    I x = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd = _mm512_castsi512_ps(bit_and(x, set1(0xFFFF0000u)));
  }
  template <class T>
  BOP2ND_INLINE static void load_pairs(const T* p, F& even, F& odd) {
    F a = load(p, kLanes), b = load(p + kLanes, kLanes);
    I lanes = add_int(iota(), iota());
    even = _mm512_permutex2var_ps(a, lanes, b);
    odd = _mm512_permutex2var_ps(a, add_int(lanes, set1(1)), b);
  }
  // The high halves of the lanes.
  BOP2ND_INLINE static void store_pairs(BFloat16* p, I even, I odd) {
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, shift_right<16>(even), odd));
  }
  BOP2ND_INLINE static uint32_t pair_bits(M even, M odd) {
    return _pdep_u32(even, 0x55555555u) | _pdep_u32(odd, 0x55555555u) << 1;
  }
  // Whether no lane is infinite or NaN.
  BOP2ND_INLINE static bool all_finite(F a) { return _mm512_fpclass_ps_mask(a, 0x99) == 0; }

 private:
  BOP2ND_INLINE static __mmask16 first(int n) {
    return n >= kLanes ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1u);
  }
  BOP2ND_INLINE static __m256i load16(const void* p, int n) {
    if (n >= kLanes) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm256_maskz_loadu_epi16(first(n), p);
  }
  BOP2ND_INLINE static void store16(void* p, __m256i a, int n) {
    if (n >= kLanes) return _mm256_storeu_si256(static_cast<__m256i*>(p), a);
    _mm256_mask_storeu_epi16(p, first(n), a);
  }
};

struct Avx512Count {
  using Lanes = Avx512Lanes;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kPixels = 2;
  static constexpr bool kCountsBytes = false;  // see count_bytes.inl

  BOP2ND_INLINE static I set1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  BOP2ND_INLINE static I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  BOP2ND_INLINE static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  BOP2ND_INLINE static I xor_word(I a, const uint32_t* x) { return bit_xor(a, set1(*x)); }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
  // plane + a + b = plane + 2 carry. The carry is (a == b ? a : not the new plane): no operand is needed
  // twice, so that the compiler does not have to copy any.
  BOP2ND_INLINE static void full_add(I& plane, I a, I b, I& carry) {
    plane = _mm512_ternarylogic_epi32(plane, a, b, 0x96);
    carry = _mm512_ternarylogic_epi32(a, plane, b, 0xB2);
  }
  // The same for a = w0 ^ x[0] and b = a ^ w1 ^ x[1]; see matmul.inl on pairs.
  BOP2ND_INLINE static void pair_add(I& plane, I w0, I w1, const uint32_t* x, I& carry) {
    I a = xor_word(w0, x), old = plane;
    plane = _mm512_ternarylogic_epi32(old, w1, set1(x[1]), 0x96);
    carry = _mm512_ternarylogic_epi32(a, old, plane, 0xD4);  // old == plane ? a : old
  }
  // Popcounts of bytes, times 1 << kPlane.
  template <int kPlane>
  BOP2ND_INLINE static I byte_counts(I a) {
    constexpr char k1 = 1 << kPlane, k2 = 2 << kPlane, k3 = 3 << kPlane, k4 = static_cast<char>(4 << kPlane);
    I table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, k1, k1, k2, k1, k2, k2, k3, k1, k2, k2, k3, k2, k3, k3, k4));
    I low = _mm512_set1_epi8(15);
    I high = bit_and(_mm512_srli_epi32(a, 4), low);
    return _mm512_add_epi8(_mm512_shuffle_epi8(table, bit_and(a, low)), _mm512_shuffle_epi8(table, high));
  }
  BOP2ND_INLINE static I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
  BOP2ND_INLINE static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  // sums[v], lane 4 l + i: low + 32 high, summed over the bytes of lane 4 v + i of the l-th 16 bytes.
  template <int L>
  BOP2ND_INLINE static void sum_lanes(I low, I high, I (&sums)[32 / L]) {
    I ones = _mm512_set1_epi8(1), zero = set1(0);
    if constexpr (L == 8) {
      I weights = _mm512_set1_epi16(32 << 8 | 1);
      I first = _mm512_maddubs_epi16(_mm512_unpacklo_epi8(low, high), weights);
      I second = _mm512_maddubs_epi16(_mm512_unpackhi_epi8(low, high), weights);
      sums[0] = _mm512_unpacklo_epi16(first, zero);
      sums[1] = _mm512_unpackhi_epi16(first, zero);
      sums[2] = _mm512_unpacklo_epi16(second, zero);
      sums[3] = _mm512_unpackhi_epi16(second, zero);
    } else {
      I halves =
          _mm512_add_epi16(_mm512_maddubs_epi16(low, ones), _mm512_maddubs_epi16(high, _mm512_set1_epi8(32)));
      if constexpr (L == 16) {
        sums[0] = _mm512_unpacklo_epi16(halves, zero);
        sums[1] = _mm512_unpackhi_epi16(halves, zero);
      } else {
        sums[0] = _mm512_madd_epi16(halves, _mm512_set1_epi16(1));
      }
    }
  }
  // The first n words at `from`, each as 32 / L words that repeat one of its parts of L bits. Reads no more.
  template <int L>
  BOP2ND_INLINE static I spread(const uint32_t* from, int n) {
    uint32_t words = n >= 16 ? 0xFFFFu : (1u << n) - 1u;
    if constexpr (L == 8) {
      I bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi32(static_cast<__mmask8>(words), from));
      I low = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
      return _mm512_shuffle_epi8(bytes, low);
    } else if constexpr (L == 16) {
      I halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi32(static_cast<__mmask8>(words), from));
      return _mm512_or_si512(halves, _mm512_slli_epi32(halves, 16));
    } else {
      return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(words), from);
    }
  }
  // Odd lanes become their exclusive or with the lane before.
  BOP2ND_INLINE static I make_pairs(I a) { return bit_xor(a, _mm512_slli_epi64(a, 32)); }
  BOP2ND_INLINE static I dot(I bias, I count) { return _mm512_sub_epi32(bias, add(count, count)); }
  BOP2ND_INLINE static Lanes::F real(I a) { return _mm512_cvtepi32_ps(a); }
  BOP2ND_INLINE static uint32_t less(I a, const int32_t* threshold, int n) {
    __mmask16 lanes = n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1u);
    return _mm512_mask_cmplt_epi32_mask(lanes, a, _mm512_maskz_loadu_epi32(lanes, threshold));
  }
  BOP2ND_INLINE static void keep_in_register(I& a) { asm volatile("" : "+v"(a)); }
};

// What signed_bytes.inl takes besides. Pairs of products are at most 510, so that 64 of them fit 16 bits.
struct Avx512Bytes : Avx512Lanes {
  static constexpr int kRows = 4, kSteps = 64;

  template <int nibble>
  BOP2ND_INLINE static I spread_signs(I words) {
    constexpr int b = nibble / 2, first = 1 << (4 * (nibble % 2));
    I bytes = _mm512_shuffle_epi8(words, _mm512_set4_epi32((12 + b) * 0x01010101, (8 + b) * 0x01010101,
                                                           (4 + b) * 0x01010101, b * 0x01010101));
    __mmask64 negative = _mm512_test_epi8_mask(
        bytes, _mm512_set1_epi32(static_cast<int>(0x08040201u * static_cast<uint32_t>(first))));
    return _mm512_mask_blend_epi8(negative, _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
  }
  BOP2ND_INLINE static void add_products(I& sums, I x, I w) {
    sums = _mm512_add_epi16(sums, _mm512_maddubs_epi16(x, w));
  }
  BOP2ND_INLINE static I whole(I sums) { return _mm512_madd_epi16(sums, _mm512_set1_epi16(1)); }
};

}  // namespace bop2nd

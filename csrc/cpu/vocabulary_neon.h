// SPDX-License-Identifier: Apache-2.0
// The vocabulary in NEON (Advanced SIMD of 64-bit ARM). Include after <arm_neon.h> and <cstring>.
#pragma once

#include "../core/rounding.h"
#include "kernels.h"
#include "target.h"
#include "vocabulary_scalar.h"

namespace bop2nd {

struct NeonLanes {
  static constexpr int kLanes = 4;
  static constexpr bool kPairs = true;                     // see load_pairs
  static constexpr int kRealVectors = 4, kRealPixels = 6;  // see real.inl
  using F = float32x4_t;
  using I = uint32x4_t;
  using M = uint32x4_t;  // all ones or all zeros per lane
  using Set = uint32_t;  // a bit per lane
  static constexpr bool kScreens = true;

  BOP2ND_INLINE static F setf(float x) { return vdupq_n_f32(x); }
  BOP2ND_INLINE static F add(F a, F b) { return vaddq_f32(a, b); }
  BOP2ND_INLINE static F sub(F a, F b) { return vsubq_f32(a, b); }
  BOP2ND_INLINE static F mul(F a, F b) { return vmulq_f32(a, b); }
  BOP2ND_INLINE static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  BOP2ND_INLINE static F sqrt(F a) { return vsqrtq_f32(a); }
  BOP2ND_INLINE static F abs(F a) { return vabsq_f32(a); }
  BOP2ND_INLINE static F flip_sign(F a, M m) { return as_float(veorq_u32(as_int(a), vshlq_n_u32(m, 31))); }
  BOP2ND_INLINE static F keep(F a, M m) { return as_float(vandq_u32(as_int(a), m)); }
  BOP2ND_INLINE static M less_zero(F a) { return vcltzq_f32(a); }
  BOP2ND_INLINE static M greater(F a, F b) { return vcgtq_f32(a, b); }
  BOP2ND_INLINE static M at_most(F a, F b) { return vcleq_f32(a, b); }
  BOP2ND_INLINE static M not_less(F a, F b) { return vmvnq_u32(vcltq_f32(a, b)); }
  BOP2ND_INLINE static Set bits(M a) { return vaddvq_u32(vandq_u32(a, places())); }
  BOP2ND_INLINE static Set same(Set a, Set b) { return ~(a ^ b) & 0xFu; }
  BOP2ND_INLINE static Set both(Set a, Set b) { return a & b; }
  BOP2ND_INLINE static bool none(Set a) { return a == 0; }
  BOP2ND_INLINE static M from_bits(uint32_t bits) { return vtstq_u32(set1(bits), places()); }

  BOP2ND_INLINE static I set1(uint32_t x) { return vdupq_n_u32(x); }
  BOP2ND_INLINE static I iota() { return I{0, 1, 2, 3}; }
  BOP2ND_INLINE static I load_int(const uint32_t* p) { return vld1q_u32(p); }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { vst1q_u32(p, a); }
  BOP2ND_INLINE static I add_int(I a, I b) { return vaddq_u32(a, b); }
  BOP2ND_INLINE static I mul_int(I a, I b) { return vmulq_u32(a, b); }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return veorq_u32(a, b); }
  BOP2ND_INLINE static I bit_and(I a, I b) { return vandq_u32(a, b); }
  BOP2ND_INLINE static I bit_or(I a, I b) { return vorrq_u32(a, b); }
  BOP2ND_INLINE static I xor_and(I a, I b, I mask) { return bit_and(bit_xor(a, b), mask); }
  template <int n>
  BOP2ND_INLINE static I shift_right(I a) {
    return vshrq_n_u32(a, n);
  }
  BOP2ND_INLINE static M equal(I a, I b) { return vceqq_u32(a, b); }
  BOP2ND_INLINE static I select(M m, I yes, I no) { return vbslq_u32(m, yes, no); }
  BOP2ND_INLINE static I as_int(F a) { return vreinterpretq_u32_f32(a); }
  BOP2ND_INLINE static F as_float(I a) { return vreinterpretq_f32_u32(a); }

  BOP2ND_INLINE static I look_up(const uint32_t* table, I index) {
    uint8x16x4_t bytes = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
    I first = vmulq_n_u32(vandq_u32(index, vdupq_n_u32(15)), 0x04040404u);
    return vreinterpretq_u32_u8(
        vqtbl4q_u8(bytes, vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)))));
  }

  // n <= 0 reads nothing, n >= 4 reads all lanes; lanes not read are 0.
  BOP2ND_INLINE static F load(const float* p, int n) {
    if (n >= kLanes) return vld1q_f32(p);
    float there[kLanes] = {};
    for (int i = 0; i < n; ++i) there[i] = p[i];
    return vld1q_f32(there);
  }
  BOP2ND_INLINE static F load(const BFloat16* p, int n) { return as_float(vshll_n_u16(load16(p, n), 16)); }
  BOP2ND_INLINE static F load(const Float16* p, int n) {
    return vcvt_f32_f16(vreinterpret_f16_u16(load16(p, n)));
  }
  BOP2ND_INLINE static void store(float* p, F a, int n) {
    if (n >= kLanes) return vst1q_f32(p, a);
    for (int i = 0; i < n; ++i) p[i] = a[i];
  }
  BOP2ND_INLINE static void store(BFloat16* p, F a, int n) {
    I bits = as_int(a);
    I odd = bit_and(shift_right<16>(bits), set1(1));
    I rounded = add_int(bits, add_int(odd, set1(0x7FFF)));
    M number = vceqq_f32(a, a);
    store_low16(p, shift_right<16>(select(number, rounded, bit_or(bits, set1(0x00400000u)))), n);
  }
  BOP2ND_INLINE static void store(Float16* p, F a, int n) {
    store16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)), n);
  }
  BOP2ND_INLINE static void store_low16(BFloat16* p, I a, int n) { store16(p, vmovn_u32(a), n); }

  // Pairs: 8 neighbouring elements as two vectors, those of even and those of odd position.
  BOP2ND_INLINE static void load_pairs(const BFloat16* p, F& even, F& odd) {
    I x = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    even = as_float(vshlq_n_u32(x, 16));
    odd = as_float(bit_and(x, set1(0xFFFF0000u)));
  }
  template <class T>
  BOP2ND_INLINE static void load_pairs(const T* p, F& even, F& odd) {
    F a = load(p, kLanes), b = load(p + kLanes, kLanes);
    even = vuzp1q_f32(a, b), odd = vuzp2q_f32(a, b);
  }
  // The high halves of the lanes.
  BOP2ND_INLINE static void store_pairs(BFloat16* p, I even, I odd) {
    vst1q_u16(reinterpret_cast<uint16_t*>(p),
              vtrn2q_u16(vreinterpretq_u16_u32(even), vreinterpretq_u16_u32(odd)));
  }
  BOP2ND_INLINE static uint32_t pair_bits(M even, M odd) {
    uint16x8_t halves = vtrn1q_u16(vreinterpretq_u16_u32(even), vreinterpretq_u16_u32(odd));
    return vaddvq_u16(vandq_u16(halves, uint16x8_t{1, 2, 4, 8, 16, 32, 64, 128}));
  }
  // Whether no lane is infinite or NaN.
  BOP2ND_INLINE static bool all_finite(F a) {
    return vminvq_u32(vcltq_f32(abs(a), setf(__builtin_inff()))) != 0;
  }

  BOP2ND_INLINE static void transpose_words(const uint32_t* words, uint32_t* to) {
    ScalarLanes::transpose_words(words, to);
  }
  static constexpr int kBlock = 4;
  BOP2ND_INLINE static void transpose_block(const float* from, int64_t from_stride, float* to,
                                            int64_t to_stride) {
    float64x2_t pair[2][2];  // of rows 2 i and 2 i + 1: columns 0 and 2, columns 1 and 3
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      F a = vld1q_f32(from + 2 * i * from_stride), b = vld1q_f32(from + (2 * i + 1) * from_stride);
      pair[i][0] = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
      pair[i][1] = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      vst1q_f32(to + i * to_stride, vreinterpretq_f32_f64(vtrn1q_f64(pair[0][i], pair[1][i])));
      vst1q_f32(to + (i + 2) * to_stride, vreinterpretq_f32_f64(vtrn2q_f64(pair[0][i], pair[1][i])));
    }
  }

 private:
  BOP2ND_INLINE static I places() { return I{1, 2, 4, 8}; }
  BOP2ND_INLINE static uint16x4_t load16(const void* p, int n) {
    if (n >= kLanes) return vld1_u16(static_cast<const uint16_t*>(p));
    uint16_t there[kLanes] = {};
    if (n > 0) std::memcpy(there, p, 2 * static_cast<unsigned>(n));
    return vld1_u16(there);
  }
  BOP2ND_INLINE static void store16(void* p, uint16x4_t a, int n) {
    if (n >= kLanes) return vst1_u16(static_cast<uint16_t*>(p), a);
    uint16_t there[kLanes];
    vst1_u16(there, a);
    if (n > 0) std::memcpy(p, there, 2 * static_cast<unsigned>(n));
  }
};

// What signed_bytes.inl takes besides. Signs are bytes of all ones (-1) or 0; pairs of products are at most
// 510, so that 64 of them fit 16 bits.
struct NeonBytes : NeonLanes {
  static constexpr int kRows = 2, kSteps = 64;

  template <int nibble>
  BOP2ND_INLINE static I spread_signs(I words) {
    constexpr uint8_t b = nibble / 2, first = 1 << (4 * (nibble % 2));
    constexpr uint8_t c = b + 4, d = b + 8, e = b + 12;
    uint8x16_t bytes =
        vqtbl1q_u8(vreinterpretq_u8_u32(words), uint8x16_t{b, b, b, b, c, c, c, c, d, d, d, d, e, e, e, e});
    I bit = set1(0x08040201u * first);
    return vreinterpretq_u32_u8(vtstq_u8(bytes, vreinterpretq_u8_u32(bit)));
  }
  BOP2ND_INLINE static void add_products(I& sums, I x, I w) {
    uint16x8_t positive = vpadalq_u8(vreinterpretq_u16_u32(sums), vreinterpretq_u8_u32(vbicq_u32(x, w)));
    sums = vreinterpretq_u32_u16(vsubq_u16(positive, vpaddlq_u8(vreinterpretq_u8_u32(vandq_u32(x, w)))));
  }
  BOP2ND_INLINE static I whole(I sums) {
    return vreinterpretq_u32_s32(vpaddlq_s16(vreinterpretq_s16_u32(sums)));
  }
};

struct NeonCount {
  using Lanes = NeonLanes;
  static constexpr int kLanes = 4;
  static constexpr int kPixels = 2;
  using Bytes = uint8x16_t;
  using Halves = uint16x8_t;
  using I = uint32x4_t;

  BOP2ND_INLINE static I set1(uint32_t x) { return vdupq_n_u32(x); }
  BOP2ND_INLINE static I load(const uint32_t* p) { return vld1q_u32(p); }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return veorq_u32(a, b); }
  BOP2ND_INLINE static I xor_word(I a, const uint32_t* x) { return veorq_u32(a, vld1q_dup_u32(x)); }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { vst1q_u32(p, a); }
  BOP2ND_INLINE static void pair_add(I& plane, I w0, I w1, const uint32_t* x, I& carry) {
    I a = xor_word(w0, x), differ = xor_word(w1, x + 1);
    carry = vbslq_u32(differ, plane, a);
    plane = veorq_u32(plane, differ);
  }
  BOP2ND_INLINE static I add(I a, I b) { return vaddq_u32(a, b); }
  // The first n words at `from`, each as 32 / L words that repeat one of its parts of L bits. Reads no more.
  template <int L>
  BOP2ND_INLINE static I spread(const uint32_t* from, int n) {
    if constexpr (L == 32) return load_words(from, n);
    I a = set1(from[0]);
    if constexpr (L == 16) {
      I both = n > 1 ? vcombine_u32(vget_low_u32(a), vdup_n_u32(from[1])) : a;
      Bytes halves{0, 1, 0, 1, 2, 3, 2, 3, 8, 9, 8, 9, 10, 11, 10, 11};
      return vreinterpretq_u32_u8(vqtbl1q_u8(as_bytes(both), halves));
    }
    Bytes bytes{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    return vreinterpretq_u32_u8(vqtbl1q_u8(as_bytes(a), bytes));
  }
  // Odd lanes become their exclusive or with the lane before.
  BOP2ND_INLINE static I make_pairs(I a) {
    return veorq_u32(a, vreinterpretq_u32_u64(vshlq_n_u64(vreinterpretq_u64_u32(a), 32)));
  }
  BOP2ND_INLINE static I dot(I bias, I count) { return vmlsq_n_u32(bias, count, 2); }
  BOP2ND_INLINE static Lanes::F real(I a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
  BOP2ND_INLINE static uint32_t less(I a, const int32_t* threshold, int n) {
    if (n < kLanes) {
      uint32_t bits = 0;
      for (int i = 0; i < n; ++i) bits |= (static_cast<int32_t>(a[i]) < threshold[i] ? 1u : 0u) << i;
      return bits;
    }
    return Lanes::bits(vcltq_s32(vreinterpretq_s32_u32(a), vld1q_s32(threshold)));
  }
  template <class T>
  BOP2ND_INLINE static void keep_in_register(T& a) {
    asm volatile("" : "+w"(a));
  }

  // ---- What count_bytes.inl takes besides.
  static constexpr bool kCountsBytes = true;
  // Sums of bytes for the lanes of a vector.
  template <int L>
  struct Wide {
    std::conditional_t<L == 32, I, Halves> sum[L == 8 ? 2 : 1];
  };

  BOP2ND_INLINE static Bytes no_bytes() { return vdupq_n_u8(0); }
  BOP2ND_INLINE static Bytes popcounts(I a) { return vcntq_u8(vreinterpretq_u8_u32(a)); }
  BOP2ND_INLINE static Bytes add_bytes(Bytes a, Bytes b) { return vaddq_u8(a, b); }
  template <int L>
  BOP2ND_INLINE static void clear(Wide<L>& wide) {
    for (auto& sum : wide.sum) sum = decltype(sum + sum){};
  }
  BOP2ND_INLINE static void add_to(Wide<8>& wide, Bytes bytes) {
    wide.sum[0] = vaddw_u8(wide.sum[0], vget_low_u8(bytes));
    wide.sum[1] = vaddw_high_u8(wide.sum[1], bytes);
  }
  BOP2ND_INLINE static void add_to(Wide<16>& wide, Bytes bytes) {
    wide.sum[0] = vpadalq_u8(wide.sum[0], bytes);
  }
  BOP2ND_INLINE static void add_to(Wide<32>& wide, Bytes bytes) {
    wide.sum[0] = vpadalq_u16(wide.sum[0], vpaddlq_u8(bytes));
  }
  template <int L>
  BOP2ND_INLINE static void twice(Wide<L>& wide) {
    for (auto& sum : wide.sum) sum = sum + sum;
  }
  // counts[v]: of lanes 4 v .. 4 v + 3.
  template <int L>
  BOP2ND_INLINE static void widen(const Wide<L>& wide, I (&counts)[32 / L]) {
    if constexpr (L == 32) {
      counts[0] = wide.sum[0];
    } else {
      for (int i = 0; i < 16 / L; ++i) {
        counts[2 * i] = vmovl_u16(vget_low_u16(wide.sum[i]));
        counts[2 * i + 1] = vmovl_high_u16(wide.sum[i]);
      }
    }
  }

  // ---- What lookup_bytes.inl takes besides.
  using Words = uint32x4_t;
  static constexpr int kBytes = 16;

  BOP2ND_INLINE static Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  BOP2ND_INLINE static void store_bytes(void* p, Bytes a) { vst1q_u8(static_cast<uint8_t*>(p), a); }
  BOP2ND_INLINE static Bytes look_up(Bytes table, Bytes indices) { return vqtbl1q_u8(table, indices); }
  // Loads from p on come after `a` was computed: compilers that bring them forward run out of registers.
  BOP2ND_INLINE static void order(const uint8_t*& p, const Bytes& a) { asm("" : "+r"(p) : "w"(a)); }
  // sum + (a >> 4), of bytes.
  BOP2ND_INLINE static Bytes add_high_nibbles(Bytes sum, Bytes a) { return vsraq_n_u8(sum, a, 4); }
  // a - 16 b, of bytes.
  BOP2ND_INLINE static Bytes less_16(Bytes a, Bytes b) { return vsubq_u8(a, vshlq_n_u8(b, 4)); }
  BOP2ND_INLINE static Bytes low_nibbles(Bytes a) { return vandq_u8(a, vdupq_n_u8(15)); }
  BOP2ND_INLINE static Bytes high_nibbles(Bytes a) { return vshrq_n_u8(a, 4); }
  BOP2ND_INLINE static Bytes as_bytes(I a) { return vreinterpretq_u8_u32(a); }
  // The low and the high bytes of the halves of a and then of b.
  BOP2ND_INLINE static Bytes low_bytes(I a, I b) { return vuzp1q_u8(as_bytes(a), as_bytes(b)); }
  BOP2ND_INLINE static Bytes high_bytes(I a, I b) { return vuzp2q_u8(as_bytes(a), as_bytes(b)); }
  // The first n words, at most 4, others 0.
  BOP2ND_INLINE static Words load_words(const uint32_t* p, int n) {
    if (n == 4) return vld1q_u32(p);
    uint32_t there[4] = {};
    for (int i = 0; i < n; ++i) there[i] = p[i];
    return vld1q_u32(there);
  }
  // For every 4 bits of a and b, in order: 16 (a + 16 b), where the table of the two starts.
  BOP2ND_INLINE static void store_offsets(uint16_t* to, Words a, Words b) {
    Bytes bytes_a = as_bytes(a), bytes_b = as_bytes(b);
    Bytes even = vsliq_n_u8(low_nibbles(bytes_a), bytes_b, 4);
    Bytes odd = vorrq_u8(high_nibbles(bytes_a), vandq_u8(bytes_b, vdupq_n_u8(0xF0)));
    Bytes first = vzip1q_u8(even, odd), second = vzip2q_u8(even, odd);
    vst1q_u16(to, vshll_n_u8(vget_low_u8(first), 4)), vst1q_u16(to + 8, vshll_high_n_u8(first, 4));
    vst1q_u16(to + 16, vshll_n_u8(vget_low_u8(second), 4)), vst1q_u16(to + 24, vshll_high_n_u8(second, 4));
  }
};

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// The vocabulary in plain C++ and the compilers' portable 16-byte vectors: any machine.
#pragma once

#include <cstring>

#include "../core/half_float.h"
#include "../core/rounding.h"

namespace bop2nd {

struct ScalarLanes {
  static constexpr int kLanes = 4;
  static constexpr bool kPairs = false;
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t I __attribute__((vector_size(16)));
  typedef int32_t M __attribute__((vector_size(16)));  // -1 where true
  using Set = uint32_t;                                // a bit per lane
  static constexpr bool kScreens = true;

  BOP2ND_INLINE static F setf(float x) { return F{x, x, x, x}; }
  BOP2ND_INLINE static F add(F a, F b) { return a + b; }
  BOP2ND_INLINE static F sub(F a, F b) { return a - b; }
  BOP2ND_INLINE static F mul(F a, F b) { return a * b; }
  static constexpr int kRealVectors = 2, kRealPixels = 4;  // of real.inl
  BOP2ND_INLINE static F fma(F a, F b, F c) {
    return a * b + c;
  }  // a fused one where there is an instruction
  BOP2ND_INLINE static F sqrt(F a) {
    return F{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
  }
  BOP2ND_INLINE static F abs(F a) { return as_float(as_int(a) & set1(0x7FFFFFFFu)); }
  BOP2ND_INLINE static F flip_sign(F a, M m) {
    return as_float(as_int(a) ^ (reinterpret_cast<I>(m) & set1(0x80000000u)));
  }
  BOP2ND_INLINE static F keep(F a, M m) { return as_float(as_int(a) & reinterpret_cast<I>(m)); }
  BOP2ND_INLINE static M less_zero(F a) { return a < setf(0.0f); }
  BOP2ND_INLINE static M greater(F a, F b) { return a > b; }
  BOP2ND_INLINE static M at_most(F a, F b) { return a <= b; }
  BOP2ND_INLINE static M not_less(F a, F b) { return ~(a < b); }
  BOP2ND_INLINE static Set bits(M a) { return (a[0] & 1u) | (a[1] & 2u) | (a[2] & 4u) | (a[3] & 8u); }
  BOP2ND_INLINE static Set same(Set a, Set b) { return ~(a ^ b) & 0xFu; }
  BOP2ND_INLINE static Set both(Set a, Set b) { return a & b; }
  BOP2ND_INLINE static bool none(Set a) { return a == 0; }
  BOP2ND_INLINE static M from_bits(uint32_t bits) {
    I lane{1, 2, 4, 8};
    return equal(set1(bits) & lane, lane);
  }

  BOP2ND_INLINE static I set1(uint32_t x) { return I{x, x, x, x}; }
  BOP2ND_INLINE static I iota() { return I{0, 1, 2, 3}; }
  BOP2ND_INLINE static I load_int(const uint32_t* p) {
    I a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { std::memcpy(p, &a, sizeof a); }
  BOP2ND_INLINE static I add_int(I a, I b) { return a + b; }
  BOP2ND_INLINE static I mul_int(I a, I b) { return a * b; }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return a ^ b; }
  BOP2ND_INLINE static I bit_and(I a, I b) { return a & b; }
  BOP2ND_INLINE static I bit_or(I a, I b) { return a | b; }
  template <int n>
  BOP2ND_INLINE static I shift_right(I a) {
    return a >> n;
  }
  BOP2ND_INLINE static M equal(I a, I b) { return a == b; }
  BOP2ND_INLINE static I select(M m, I yes, I no) {
    I chosen = reinterpret_cast<I>(m);
    return (chosen & yes) | (~chosen & no);
  }
  BOP2ND_INLINE static I as_int(F a) { return reinterpret_cast<I>(a); }
  BOP2ND_INLINE static F as_float(I a) { return reinterpret_cast<F>(a); }

  // The table's 16 words at the low 4 bits of every lane.
  BOP2ND_INLINE static I look_up(const uint32_t* table, I index) {
    index &= set1(15);
    return I{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  }

  // n <= 0 reads nothing, n >= 4 reads all lanes; lanes not read are 0.
  template <class T>
  BOP2ND_INLINE static F load(const T* p, int n) {
    F a = setf(0.0f);
    if (n >= kLanes) return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
    for (int i = 0; i < n; ++i) a[i] = to_float(p[i]);
    return a;
  }
  template <class T>
  BOP2ND_INLINE static void store(T* p, F a, int n) {
    if (n >= kLanes) n = kLanes;
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(a[i]);
  }
  BOP2ND_INLINE static void store(float* p, F a, int n) {
    if (n >= kLanes) {
      std::memcpy(p, &a, sizeof a);
      return;
    }
    for (int i = 0; i < n; ++i) p[i] = a[i];
  }
  BOP2ND_INLINE static void store_low16(BFloat16* p, I a, int n) {
    if (n >= kLanes) n = kLanes;
    for (int i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(a[i]);
  }
  // to[i]: bit i of 32 words. Halves of ever smaller squares change places.
  static void transpose_words(const uint32_t* words, uint32_t* to) {
    std::memcpy(to, words, 32 * sizeof *to);
    uint32_t low = 0x0000FFFFu;
    for (int width = 16; width > 0; width /= 2, low ^= low << width) {
      for (int i = 0; i < 32; i = (i + width + 1) & ~width) {
        uint32_t swapped = (to[i] >> width ^ to[i + width]) & low;
        to[i] ^= swapped << width, to[i + width] ^= swapped;
      }
    }
  }
  static constexpr int kBlock = 4;
  BOP2ND_INLINE static void transpose_block(const float* from, int64_t from_stride, float* to,
                                            int64_t to_stride) {
    for (int row = 0; row < kBlock; ++row) {
      for (int column = 0; column < kBlock; ++column)
        to[column * to_stride + row] = from[row * from_stride + column];
    }
  }
};

// What signed_bytes.inl takes besides: products of four unsigned bytes of x with four signs, in every lane.
struct ScalarBytes : ScalarLanes {
  static constexpr int kRows = 2;         // of x at a time, as many as registers hold sums of
  static constexpr int kSteps = 1 << 20;  // add_products before sums have to be made whole

  // Four bytes, +1 or -1, of four bits of every lane.
  template <int nibble>
  BOP2ND_INLINE static I spread_signs(I words) {
    I bits = words >> (4 * nibble);
    auto byte = [bits](int i) { return ((0u - (bits >> i & set1(1))) | set1(1)) & set1(0xFF); };
    return byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
  }
  BOP2ND_INLINE static void add_products(I& sums, I x, I w) {
    for (int i = 0; i < 32; i += 8) {
      I negative = w >> (i + 7) & set1(1);  // of +1 and -1
      sums += ((x >> i & set1(255)) ^ (0u - negative)) + negative;
    }
  }
  BOP2ND_INLINE static I whole(I sums) { return sums; }  // as 32-bit numbers
};

struct ScalarCount {
  using Lanes = ScalarLanes;
  typedef uint32_t I __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kPixels = 1;            // two would be 4 % faster and 35 KB more
  static constexpr bool kCountsBytes = false;  // see count_bytes.inl

  BOP2ND_INLINE static I set1(uint32_t x) { return I{x, x, x, x}; }
  BOP2ND_INLINE static I load(const uint32_t* p) {
    I a;
    std::memcpy(&a, p, 16);
    return a;
  }
  BOP2ND_INLINE static I bit_xor(I a, I b) { return a ^ b; }
  BOP2ND_INLINE static I bit_and(I a, I b) { return a & b; }
  BOP2ND_INLINE static I xor_word(I a, const uint32_t* x) { return a ^ set1(*x); }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { std::memcpy(p, &a, 16); }
  // plane + a + b = plane + 2 carry.
  BOP2ND_INLINE static void full_add(I& plane, I a, I b, I& carry) {
    I differ = bit_xor(a, b);
    carry = (differ & plane) | (~differ & a);
    plane = bit_xor(plane, differ);
  }
  // The same for a = w0 ^ x[0] and b = a ^ w1 ^ x[1]; see matmul.inl on pairs.
  BOP2ND_INLINE static void pair_add(I& plane, I w0, I w1, const uint32_t* x, I& carry) {
    I a = xor_word(w0, x), differ = xor_word(w1, x + 1);
    carry = (differ & plane) | (~differ & a);
    plane = bit_xor(plane, differ);
  }
  // Popcounts of bytes, times 1 << kPlane.
  template <int kPlane>
  BOP2ND_INLINE static I byte_counts(I a) {
    a = a - ((a >> 1) & set1(0x55555555u));
    a = (a & set1(0x33333333u)) + ((a >> 2) & set1(0x33333333u));
    return ((a + (a >> 4)) & set1(0x0F0F0F0Fu)) << kPlane;
  }
  BOP2ND_INLINE static I add_bytes(I a, I b) { return a + b; }  // no byte ever overflows
  BOP2ND_INLINE static I add(I a, I b) { return a + b; }
  // sums[v], lane i: low + 32 high, summed over the bytes of lane 4 v + i.
  template <int L>
  BOP2ND_INLINE static void sum_lanes(I low, I high, I (&sums)[32 / L]) {
    for (int v = 0; v < 32 / L; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        uint32_t sum = 0;
        for (int byte = (4 * v + i) * L / 8, n = L / 8; n > 0; ++byte, --n)
          sum += byte_of(low, byte) + 32 * byte_of(high, byte);
        sums[v][i] = sum;
      }
    }
  }
  // The first n words at `from`, each as 32 / L words that repeat one of its parts of L bits. Reads no more.
  template <int L>
  BOP2ND_INLINE static I spread(const uint32_t* from, int n) {
    constexpr uint32_t kPart = ~0u >> (32 - L);
    I a = set1(0);
    for (int i = 0; i < kLanes && i * L / 32 < n; ++i)
      a[i] = (from[i * L / 32] >> (i * L % 32) & kPart) * (~0u / kPart);
    return a;
  }
  // Odd lanes become their exclusive or with the lane before.
  BOP2ND_INLINE static I make_pairs(I a) { return I{a[0], a[0] ^ a[1], a[2], a[2] ^ a[3]}; }
  BOP2ND_INLINE static I dot(I bias, I count) { return bias - (count + count); }
  BOP2ND_INLINE static Lanes::F real(I a) {
    typedef int32_t Signed __attribute__((vector_size(16)));
    return __builtin_convertvector(reinterpret_cast<Signed>(a), Lanes::F);
  }
  BOP2ND_INLINE static uint32_t less(I a, const int32_t* threshold, int n) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes && i < n; ++i)
      bits |= (static_cast<int32_t>(a[i]) < threshold[i] ? 1u : 0u) << i;
    return bits;
  }
  BOP2ND_INLINE static void keep_in_register(I& a) { asm volatile("" : "+m"(a)); }

 private:
  BOP2ND_INLINE static uint32_t byte_of(I a, int byte) { return a[byte / 4] >> (8 * (byte % 4)) & 0xFFu; }
};

}  // namespace bop2nd

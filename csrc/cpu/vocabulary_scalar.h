// SPDX-License-Identifier: Apache-2.0
// The vocabulary in plain C++ (and the compilers' portable 16-byte vectors for counting): any machine.
#pragma once

#include "half_float.h"
#include "../core/rounding.h"

namespace bop2nd {

struct ScalarLanes {
  static constexpr int kLanes = 1;
  static constexpr bool kPairs = false;
  using F = float;
  using I = uint32_t;
  using M = bool;

  BOP2ND_INLINE static F setf(float x) { return x; }
  BOP2ND_INLINE static F add(F a, F b) { return a + b; }
  BOP2ND_INLINE static F sub(F a, F b) { return a - b; }
  BOP2ND_INLINE static F mul(F a, F b) { return a * b; }
  BOP2ND_INLINE static F sqrt(F a) { return __builtin_sqrtf(a); }
  BOP2ND_INLINE static F abs(F a) { return __builtin_fabsf(a); }
  BOP2ND_INLINE static F flip_sign(F a, M m) {
    return float_of_bits(bits_of_float(a) ^ (m ? 0x80000000u : 0u));
  }
  BOP2ND_INLINE static F keep(F a, M m) { return m ? a : 0.0f; }
  BOP2ND_INLINE static M less_zero(F a) { return a < 0.0f; }
  BOP2ND_INLINE static M greater(F a, F b) { return a > b; }
  BOP2ND_INLINE static M at_most(F a, F b) { return a <= b; }
  BOP2ND_INLINE static M same(M a, M b) { return a == b; }
  BOP2ND_INLINE static M both(M a, M b) { return a && b; }
  BOP2ND_INLINE static uint32_t bits(M a) { return a ? 1u : 0u; }
  BOP2ND_INLINE static M from_bits(uint32_t bits) { return (bits & 1u) != 0; }

  BOP2ND_INLINE static I set1(uint32_t x) { return x; }
  BOP2ND_INLINE static I iota() { return 0; }
  BOP2ND_INLINE static I load_int(const uint32_t* p) { return *p; }
  BOP2ND_INLINE static void store_int(uint32_t* p, I a) { *p = a; }
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
  BOP2ND_INLINE static I select(M m, I yes, I no) { return m ? yes : no; }
  BOP2ND_INLINE static I as_int(F a) { return bits_of_float(a); }

  template <class T>
  BOP2ND_INLINE static F load(const T* p, int n) {
    return n > 0 ? to_float(*p) : 0.0f;
  }
  template <class T>
  BOP2ND_INLINE static void store(T* p, F a, int n) {
    if (n > 0) *p = from_float<T>(a);
  }
  BOP2ND_INLINE static void store_low16(BFloat16* p, I a, int n) {
    if (n > 0) p->bits = static_cast<uint16_t>(a);
  }
};

struct ScalarCount {
  typedef uint32_t I __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kPixels = 2;

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
  BOP2ND_INLINE static I byte_counts(I a) {
    a = a - ((a >> 1) & set1(0x55555555u));
    a = (a & set1(0x33333333u)) + ((a >> 2) & set1(0x33333333u));
    return (a + (a >> 4)) & set1(0x0F0F0F0Fu);
  }
  BOP2ND_INLINE static I add_bytes(I a, I b) { return a + b; }  // no byte ever overflows
  BOP2ND_INLINE static I add(I a, I b) { return a + b; }
  // 16 * (sum of the four bytes of each lane of `sixteens`) + (the same of `ones`)
  BOP2ND_INLINE static I add_up(I sixteens, I ones) { return (sum_bytes(sixteens) << 4) + sum_bytes(ones); }
  BOP2ND_INLINE static I dot(I bias, I count) { return bias - (count + count); }
  template <class T>
  BOP2ND_INLINE static void store(T* p, I a, int n) {
    for (int i = 0; i < kLanes && i < n; ++i)
      p[i] = from_float<T>(static_cast<float>(static_cast<int32_t>(a[i])));
  }
  BOP2ND_INLINE static uint32_t less(I a, const int32_t* threshold, int n) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes && i < n; ++i)
      bits |= (static_cast<int32_t>(a[i]) < threshold[i] ? 1u : 0u) << i;
    return bits;
  }
  BOP2ND_INLINE static void keep_in_register(I& a) { asm volatile("" : "+m"(a)); }

 private:
  BOP2ND_INLINE static I sum_bytes(I a) {
    a = (a & set1(0x00FF00FFu)) + ((a >> 8) & set1(0x00FF00FFu));
    return (a & set1(0xFFFFu)) + (a >> 16);
  }
};

}  // namespace bop2nd

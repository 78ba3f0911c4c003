// SPDX-License-Identifier: Apache-2.0
// Counter-based random bits and stochastic rounding to bf16: a pure function of (seed, step, tensor,
// element), so that the result depends neither on threads nor on the instruction set.
//
// V names I (uint32 lanes), F (fp32 lanes), M (truth values) and the functions set1, bit_xor, bit_and,
// bit_or, add_int, mul_int, shift_right<n>, equal, select, as_int.
#pragma once

#include "bit_layout.h"

namespace bop2nd {

// A 32-bit integer hash: two multiplications, three xor-shifts.
constexpr uint32_t kMixFirst = 0x7FEB352Du, kMixSecond = 0x846CA68Bu;

template <class V>
BOP2ND_HD typename V::I mix32(typename V::I x) {
  x = V::bit_xor(x, V::template shift_right<16>(x));
  x = V::mul_int(x, V::set1(kMixFirst));
  x = V::bit_xor(x, V::template shift_right<15>(x));
  x = V::mul_int(x, V::set1(kMixSecond));
  return V::bit_xor(x, V::template shift_right<16>(x));
}

// The part of the vocabulary mix32 needs, for one plain uint32.
struct PlainWord {
  using I = uint32_t;
  BOP2ND_HD static I set1(uint32_t x) { return x; }
  BOP2ND_HD static I bit_xor(I a, I b) { return a ^ b; }
  BOP2ND_HD static I mul_int(I a, I b) { return a * b; }
  template <int n>
  BOP2ND_HD static I shift_right(I a) {
    return a >> n;
  }
};

// `seed` and `step` are the two entries of the operator's seed tensor.
BOP2ND_HD uint32_t rounding_key(int64_t seed, int64_t step, int64_t tensor_index) {
  uint32_t key = mix32<PlainWord>(static_cast<uint32_t>(seed));
  key = mix32<PlainWord>(key ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  key = mix32<PlainWord>(key ^ static_cast<uint32_t>(step));
  return mix32<PlainWord>(key ^ static_cast<uint32_t>(tensor_index));
}

// The key for elements whose index has `index_high` as its upper 32 bits.
BOP2ND_HD uint32_t rounding_key_at(uint32_t key, uint32_t index_high) {
  return key + index_high * 0x9E3779B9u;
}

// Random bits of the elements whose lower index halves are `index_low`: 0..15 round m, 16..31 round v.
template <class V>
BOP2ND_HD typename V::I rounding_bits(typename V::I index_low, typename V::I key_at) {
  return mix32<V>(V::bit_xor(index_low, key_at));
}

// fp32 -> bf16 in the low half of each lane: adds `random16` (0..65535) below the cut and truncates.
// Infinities stay, NaN stays NaN.
template <class V>
BOP2ND_HD typename V::I round_bf16_stochastic(typename V::F x, typename V::I random16) {
  typename V::I bits = V::as_int(x);
  typename V::I exponent = V::set1(0x7F800000u);
  typename V::M special = V::equal(V::bit_and(bits, exponent), exponent);
  typename V::M whole = V::equal(V::bit_and(bits, V::set1(0x007FFFFFu)), V::set1(0));
  typename V::I quiet = V::select(whole, bits, V::bit_or(bits, V::set1(0x00400000u)));
  return V::template shift_right<16>(V::select(special, quiet, V::add_int(bits, random16)));
}

}  // namespace bop2nd

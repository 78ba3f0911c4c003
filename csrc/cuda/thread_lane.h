// SPDX-License-Identifier: Apache-2.0
// The vocabulary in which core/bop_rule.h and core/rounding.h are written, for one thread; on the device
// every operation is an intrinsic that cannot fuse.
#pragma once

#include "../core/bit_layout.h"

namespace bop2nd::cuda {

struct ThreadLane {
  using F = float;
  using I = uint32_t;
  using M = bool;
  using Set = bool;
  static constexpr bool kScreens = false;  // threads of a warp that decide apart wait for each other

#if defined(__CUDA_ARCH__)
  BOP2ND_HD static F add(F a, F b) { return __fadd_rn(a, b); }
  BOP2ND_HD static F sub(F a, F b) { return __fsub_rn(a, b); }
  BOP2ND_HD static F mul(F a, F b) { return __fmul_rn(a, b); }
  BOP2ND_HD static F sqrt(F a) { return __fsqrt_rn(a); }
  BOP2ND_HD static I as_int(F a) { return __float_as_uint(a); }
#else
  BOP2ND_HD static F add(F a, F b) { return a + b; }
  BOP2ND_HD static F sub(F a, F b) { return a - b; }
  BOP2ND_HD static F mul(F a, F b) { return a * b; }
  BOP2ND_HD static F sqrt(F a) { return __builtin_sqrtf(a); }
  BOP2ND_HD static I as_int(F a) {
    I bits = 0;
    __builtin_memcpy(&bits, &a, 4);
    return bits;
  }
#endif
  BOP2ND_HD static F abs(F a) { return __builtin_fabsf(a); }
  BOP2ND_HD static M less_zero(F a) { return a < 0.0f; }
  BOP2ND_HD static M greater(F a, F b) { return a > b; }
  BOP2ND_HD static Set bits(M a) { return a; }
  BOP2ND_HD static Set same(Set a, Set b) { return a == b; }
  BOP2ND_HD static Set both(Set a, Set b) { return a && b; }
  BOP2ND_HD static I set1(uint32_t x) { return x; }
  BOP2ND_HD static I add_int(I a, I b) { return a + b; }
  BOP2ND_HD static I mul_int(I a, I b) { return a * b; }
  BOP2ND_HD static I bit_xor(I a, I b) { return a ^ b; }
  BOP2ND_HD static I bit_and(I a, I b) { return a & b; }
  BOP2ND_HD static I bit_or(I a, I b) { return a | b; }
  template <int n>
  BOP2ND_HD static I shift_right(I a) {
    return a >> n;
  }
  BOP2ND_HD static M equal(I a, I b) { return a == b; }
  BOP2ND_HD static I select(M m, I yes, I no) { return m ? yes : no; }
};

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// As AVX-512, but bytes are counted by an instruction instead of a table: 2 operations instead of 6.
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bitalg,avx512vnni,f16c,popcnt,bmi,bmi2")
#include "vocabulary_avx512.h"

namespace bop2nd {
namespace {

#include "matmul.inl"
#include "yardsticks.inl"
#include "signed_lookup.inl"
#include "signed_bytes.inl"

struct BitalgCount : Avx512Count {
  template <int kPlane>
  BOP2ND_INLINE static I byte_counts(I a) {
    return _mm512_slli_epi32(_mm512_popcnt_epi8(a), kPlane);  // at most 8 << 4: bytes do not run over
  }
};

// Four products of bytes and their sum are one instruction.
struct VnniBytes : Avx512Bytes {
  static constexpr int kSteps = 1 << 20;
  BOP2ND_INLINE static void add_products(I& sums, I x, I w) { sums = _mm512_dpbusd_epi32(sums, x, w); }
  BOP2ND_INLINE static I whole(I sums) { return sums; }
};

}  // namespace

KernelTable avx512_bitalg() {
  KernelTable t = avx512();
  t.pack_pixels = pack_pixels<BitalgCount>;
  t.multiply = multiply<BitalgCount>;
  static const SignedTable products = [&t] {
    SignedTable with_vnni = *t.signed_products;
    with_vnni.multiply_bytes = multiply_bytes<VnniBytes>;
    return with_vnni;
  }();
  t.signed_products = &products;
  return t;
}

YardstickTable avx512_bitalg_yardsticks() {
  YardstickTable t = avx512_yardsticks();
  t.register_loop = register_loop<BitalgCount>;
  return t;
}

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

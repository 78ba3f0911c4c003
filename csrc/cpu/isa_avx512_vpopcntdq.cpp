// SPDX-License-Identifier: Apache-2.0
// As AVX-512, but the products are counted with the vector popcount.
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,f16c,popcnt,bmi,bmi2")
#include "vocabulary_avx512.h"

namespace bop2nd {
namespace {

#include "matmul.inl"
#include "yardsticks.inl"

struct VpopcntdqCount : Avx512Count {
  // 4 pixels to a weight vector: 1.5 loads per product, below the 1.5 cycles its 3 operations take.
  static constexpr int kPixels = 4;
  BOP2ND_INLINE static I popcount(I a) { return _mm512_popcnt_epi32(a); }
};

}  // namespace

// The other loops are those of the AVX-512 table.
const KernelTable kAvx512VpopcntdqTable = {nullptr,
                                           nullptr,
                                           nullptr,
                                           nullptr,
                                           nullptr,
                                           matmul<VpopcntdqCount, DirectCount>,
                                           DirectCount<VpopcntdqCount, 1, Rows::kPlain>::kPaired,
                                           nullptr,
                                           register_loop<VpopcntdqCount, DirectCount>};

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

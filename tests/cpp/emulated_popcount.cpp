// SPDX-License-Identifier: Apache-2.0
#include "emulated_popcount.h"

#include "cpu/dispatch.h"
#include "cpu/target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,f16c,popcnt,bmi,bmi2")
#include "cpu/vocabulary_avx512.h"

namespace bop2nd {
namespace {

#include "cpu/matmul.inl"

struct EmulatedCount : Avx512Count {
  template <int kPlane>
  BOP2ND_INLINE static I byte_counts(I a) {
    return _mm512_slli_epi32(Avx512Count::byte_counts<0>(a), kPlane);
  }
};

void emulated_count(const CountTile& t) { count<EmulatedCount>(t); }

}  // namespace
}  // namespace bop2nd
BOP2ND_TARGET_END

const bop2nd::KernelTable* emulated_bitalg_table() {
  constexpr int kAvx512 = 2;
  const bop2nd::KernelTable* base = bop2nd::table_of(kAvx512);
  if (!base) return nullptr;
  static bop2nd::KernelTable table = *base;
  table.count = bop2nd::emulated_count;
  return &table;
}
#else
const bop2nd::KernelTable* emulated_bitalg_table() { return nullptr; }
#endif

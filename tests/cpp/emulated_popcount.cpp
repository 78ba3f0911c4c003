// SPDX-License-Identifier: Apache-2.0
#include "emulated_popcount.h"

#include "cpu/dispatch.h"
#include "cpu/target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,f16c,popcnt,bmi,bmi2")
#include "cpu/vocabulary_avx512.h"

namespace bop2nd {
namespace {

#include "cpu/matmul.inl"

struct EmulatedCount : Avx512Count {
  static constexpr int kPixels = 4;  // as VpopcntdqCount
  BOP2ND_INLINE static I popcount(I a) { return add_up(set1(0), byte_counts(a)); }
};

void emulated_matmul(const MatmulTile& t, const Epilogue& e) { matmul<EmulatedCount, DirectCount>(t, e); }

}  // namespace
}  // namespace bop2nd
BOP2ND_TARGET_END

const bop2nd::KernelTable* emulated_vpopcntdq_table() {
  constexpr int kAvx512 = 2;
  const bop2nd::KernelTable* base = bop2nd::table_of(kAvx512);
  if (!base) return nullptr;
  static bop2nd::KernelTable table = *base;
  table.matmul = bop2nd::emulated_matmul;
  table.paired_words = false;
  return &table;
}
#else
const bop2nd::KernelTable* emulated_vpopcntdq_table() { return nullptr; }
#endif

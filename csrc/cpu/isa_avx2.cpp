// SPDX-License-Identifier: Apache-2.0
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "operators.h"
#include "target.h"
#include "vocabulary_words.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx2,fma,f16c,popcnt,bmi,bmi2")
#include "vocabulary_avx2.h"
#include "../core/bop_rule.h"

namespace bop2nd {
namespace {

#include "step.inl"
#include "pack.inl"
#include "matmul.inl"
#include "yardsticks.inl"
#include "lookup.inl"
#include "signed_sums.inl"
#include "depthwise.inl"
#include "signed_lookup.inl"
#include "signed_bytes.inl"
#include "signed_emit.inl"
#include "real.inl"

}  // namespace

template struct LanesComplete<Avx2Lanes>;
template struct CountComplete<Avx2Count>;
template struct BytesComplete<Avx2Bytes>;

KernelTable avx2() {
  KernelTable t{};
  t.pack_rows = pack_rows<Avx2Lanes>;
  t.pack_columns = pack_columns<Avx2Lanes>;
  t.unpack_rows = unpack_rows<Avx2Lanes>;
  t.pack_pixels = pack_pixels_for_lookup<Avx2Lookup>;
  t.multiply = multiply_by_lookup<Avx2Lookup>;
  t.sums = &kSumTable<Avx2Lanes>;
  t.signed_products = &kSignedTable<Avx2Count, Avx2Bytes>;
  t.reals = &kRealTable<Avx2Lanes>;
  return t;
}

TrainingTable avx2_training() { return kTrainingTable<Avx2Lanes>; }

YardstickTable avx2_yardsticks() {
  return {
      .stream = stream<Avx2Lanes>, .traffic = traffic<Avx2Lanes>, .register_loop = lookup_loop<Avx2Lookup>};
}

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

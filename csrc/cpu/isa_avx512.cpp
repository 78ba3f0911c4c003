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

BOP2ND_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,f16c,popcnt,bmi,bmi2")
#include "vocabulary_avx512.h"
#include "../core/bop_rule.h"

namespace bop2nd {
namespace {

#include "step.inl"
#include "pack.inl"
#include "matmul.inl"
#include "yardsticks.inl"
#include "signed_sums.inl"
#include "depthwise.inl"
#include "signed_lookup.inl"
#include "signed_bytes.inl"
#include "signed_emit.inl"
#include "real.inl"

}  // namespace

template struct LanesComplete<Avx512Lanes>;
template struct CountComplete<Avx512Count>;
template struct BytesComplete<Avx512Bytes>;

KernelTable avx512() {
  KernelTable t{};
  t.pack_rows = pack_rows<Avx512Lanes>;
  t.pack_columns = pack_columns<Avx512Lanes>;
  t.unpack_rows = unpack_rows<Avx512Lanes>;
  t.pack_pixels = pack_pixels<Avx512Count>;
  t.multiply = multiply<Avx512Count>;
  t.sums = &kSumTable<Avx512Lanes>;
  t.signed_products = &kSignedTable<Avx512Count, Avx512Bytes>;
  t.reals = &kRealTable<Avx512Lanes>;
  return t;
}

TrainingTable avx512_training() { return kTrainingTable<Avx512Lanes>; }

YardstickTable avx512_yardsticks() {
  return {.stream = stream<Avx512Lanes>,
          .traffic = traffic<Avx512Lanes>,
          .register_loop = register_loop<Avx512Count>};
}

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

// SPDX-License-Identifier: Apache-2.0
// Counts bits; look-ups wait for processors whose TBL is a single operation: isa_neon_dot.cpp.
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "operators.h"
#include "target.h"
#include "vocabulary_words.h"

#if BOP2ND_NEON
#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vocabulary_neon.h"
#include "../core/bop_rule.h"

namespace bop2nd {
namespace {

#include "step.inl"
#include "pack.inl"
#include "matmul.inl"
#include "yardsticks.inl"
#include "signed_sums.inl"
#include "depthwise.inl"
#include "real.inl"
#include "signed_lookup.inl"
#include "signed_bytes.inl"
#include "signed_emit.inl"

}  // namespace

template struct LanesComplete<NeonLanes>;
template struct CountComplete<NeonCount>;
template struct BytesComplete<NeonBytes>;

KernelTable neon() {
  KernelTable t{};
  t.pack_rows = pack_rows<NeonLanes>;
  t.pack_columns = pack_columns<NeonLanes>;
  t.unpack_rows = unpack_rows<NeonLanes>;
  t.pack_pixels = pack_pixels<NeonCount>;
  t.multiply = multiply<NeonCount>;
  t.sums = &kSumTable<NeonLanes>;
  t.reals = &kRealTable<NeonLanes>;
  t.signed_products = &kSignedTable<NeonCount, NeonBytes>;
  return t;
}

TrainingTable neon_training() { return kTrainingTable<NeonLanes>; }

YardstickTable neon_yardsticks() {
  return {
      .stream = stream<NeonLanes>, .traffic = traffic<NeonLanes>, .register_loop = register_loop<NeonCount>};
}

}  // namespace bop2nd
#endif

// SPDX-License-Identifier: Apache-2.0
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "operators.h"
#include "vocabulary_words.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "vocabulary_scalar.h"
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

template struct LanesComplete<ScalarLanes>;
template struct CountComplete<ScalarCount>;
template struct BytesComplete<ScalarBytes>;

KernelTable scalar() {
  KernelTable t{};
  t.pack_rows = pack_rows<ScalarLanes>;
  t.pack_columns = pack_columns<ScalarLanes>;
  t.unpack_rows = unpack_rows<ScalarLanes>;
  t.pack_pixels = pack_pixels<ScalarCount>;
  t.multiply = multiply<ScalarCount>;
  t.sums = &kSumTable<ScalarLanes>;
  t.signed_products = &kSignedTable<ScalarCount, ScalarBytes>;
  t.reals = &kRealTable<ScalarLanes>;
  return t;
}

TrainingTable scalar_training() { return kTrainingTable<ScalarLanes>; }

YardstickTable scalar_yardsticks() {
  return {.stream = stream<ScalarLanes>,
          .traffic = traffic<ScalarLanes>,
          .register_loop = register_loop<ScalarCount>};
}

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "operators.h"

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

}  // namespace

const KernelTable kScalarTable = {
    step<ScalarLanes>,          pack_rows<ScalarLanes>, pack_columns<ScalarLanes>, unpack_rows<ScalarLanes>,
    apply_mask<ScalarLanes>,    gather<ScalarCount>,    multiply<ScalarCount>,     stream<ScalarLanes>,
    register_loop<ScalarCount>, &kSumTable<ScalarLanes>};

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
#include "fetch_ahead.h"
#include "isa_tables.h"
#include "operators.h"
#include "target.h"

#if BOP2ND_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("avx2,f16c,popcnt,bmi,bmi2")
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

}  // namespace

const KernelTable kAvx2Table = {step<Avx2Lanes>,
                                pack_rows<Avx2Lanes>,
                                pack_columns<Avx2Lanes>,
                                unpack_rows<Avx2Lanes>,
                                apply_mask<Avx2Lanes>,
                                gather_for_lookup<Avx2Lookup>,
                                multiply_by_lookup<Avx2Lookup>,
                                stream<Avx2Lanes>,
                                lookup_loop<Avx2Lookup>,
                                &kSumTable<Avx2Lanes>};

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

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

}  // namespace

const KernelTable kAvx512Table = {
    step<Avx512Lanes>,          pack_rows<Avx512Lanes>, pack_columns<Avx512Lanes>, unpack_rows<Avx512Lanes>,
    apply_mask<Avx512Lanes>,    gather<Avx512Count>,    multiply<Avx512Count>,     stream<Avx512Lanes>,
    register_loop<Avx512Count>, &kSumTable<Avx512Lanes>};

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

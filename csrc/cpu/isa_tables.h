// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

namespace bop2nd {

extern const KernelTable kScalarTable;
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAvx512BitalgTable;  // null where the AVX-512 loop serves
extern const KernelTable kAvx512AmxTable;     // null where the loop of AVX-512 with BITALG serves

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"

// The loops of the BITALG instruction set, with its one instruction emulated, so that they are tested on
// CPUs that lack it. Null where the CPU has no AVX-512 at all.
const bop2nd::KernelTable* emulated_bitalg_table();

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"

// The loops of instruction sets with a few instructions emulated, so that they are tested on CPUs that lack
// them. Null where the CPU has no AVX-512 at all.
const bop2nd::KernelTable* emulated_bitalg_table();
const bop2nd::KernelTable* emulated_amx_table();

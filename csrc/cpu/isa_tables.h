// SPDX-License-Identifier: Apache-2.0
// The instruction sets: functions that return their tables. Only dispatch.cpp calls them, and only where the
// processor has the instructions. A set that extends another starts from what that one returns.
#pragma once

#include "kernels.h"

namespace bop2nd {

InstructionSet scalar();
InstructionSet avx2();
InstructionSet avx512();
InstructionSet avx512_bitalg();
InstructionSet avx512_amx();
InstructionSet neon();
InstructionSet neon_dot();

}  // namespace bop2nd

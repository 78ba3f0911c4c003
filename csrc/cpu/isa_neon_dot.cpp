// SPDX-License-Identifier: Apache-2.0
// NEON with UDOT, which is also the mark of processors that look up 16 bytes (TBL) in one operation:
// Cortex-A76 and later ones. Cortex-A57 and A72 take three, and count faster than they look up.
#include "isa_tables.h"
#include "operators.h"
#include "target.h"

#if BOP2ND_NEON
#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

BOP2ND_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#include "vocabulary_neon_dot.h"

namespace bop2nd {
namespace {

#include "matmul.inl"
#include "lookup_bytes.inl"

}  // namespace

InstructionSet neon_dot() {
  InstructionSet set = neon();
  set.kernels.pack_pixels = pack_pixels_for_bytes<NeonDotCount>;
  set.kernels.multiply = multiply_by_bytes<NeonDotCount>;
  set.yardsticks.register_loop = byte_lookup_loop<NeonDotCount>;
  return set;
}

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

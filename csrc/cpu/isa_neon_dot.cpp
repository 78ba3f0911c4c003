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

KernelTable neon_dot() {
  KernelTable t = neon();
  t.pack_pixels = pack_pixels_for_bytes<NeonDotCount>;
  t.multiply = multiply_by_bytes<NeonDotCount>;
  return t;
}

YardstickTable neon_dot_yardsticks() {
  YardstickTable t = neon_yardsticks();
  t.register_loop = byte_lookup_loop<NeonDotCount>;
  return t;
}

}  // namespace bop2nd
BOP2ND_TARGET_END
#endif

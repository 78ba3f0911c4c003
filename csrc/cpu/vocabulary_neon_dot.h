// SPDX-License-Identifier: Apache-2.0
// What UDOT adds to NEON. Include inside a target region, after vocabulary_neon.h.
#pragma once

#include "vocabulary_neon.h"

namespace bop2nd {

struct NeonDotCount : NeonCount {
  // Four bytes of a lane at once, where NEON widens twice.
  template <int L>
  BOP2ND_INLINE static void add_to(Wide<L>& wide, Bytes bytes) {
    if constexpr (L == 32) {
      wide.sum[0] = vdotq_u32(wide.sum[0], bytes, vdupq_n_u8(1));
    } else {
      NeonCount::add_to(wide, bytes);
    }
  }
};

}  // namespace bop2nd

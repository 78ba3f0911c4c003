// SPDX-License-Identifier: Apache-2.0
// Element types of the tensors that the loops read and write. No torch; compiles for host and device.
#pragma once

#include <cstdint>

#include "bit_layout.h"

namespace bop2nd {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kPacked };  // packed: words of bits

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Of the real types.
BOP2ND_HD constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace bop2nd

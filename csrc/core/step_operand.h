// SPDX-License-Identifier: Apache-2.0
// One parameter of the step. Knows no torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bop2nd {

// In walk order. Packed weights: `rows` rows of `length` elements, each padded to whole words; dense weights:
// one row. State and gradient are contiguous and not padded.
struct StepOperand {
  void* weight;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;  // null for Bop
  Dtype weight_type, grad_type, state_type;
  int64_t rows, length;
  uint32_t key;  // rounding_key of this tensor, for bf16 state on a CPU
};

}  // namespace bop2nd

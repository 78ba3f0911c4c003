// SPDX-License-Identifier: Apache-2.0
// Products of signs with real numbers and 8-bit integers on plain memory. No torch.
#pragma once

#include <cstdint>

#include "../core/conv_shape.h"
#include "kernels.h"

namespace bop2nd {

enum class SignedInput : int { kReal, kInt8, kUint8 };

// sum +-x over the taps and channels of a group; of integers, sum +-(multiplier * x - zero_point).
struct SignedProduct {
  ConvShape shape;
  SignedInput input;
  const void* x;  // fp32, int8 or uint8
  int64_t image_stride, row_stride, column_stride, channel_stride;
  int32_t multiplier, zero_point;
  const uint32_t* w;        // [out_channels, taps, group_words]
  const uint32_t* blocked;  // as prepack_weight lays it, or null
  const float* input_scale;
  bool scale_per_image;  // or one for all
  Epilogue to;           // its pixels are [batch, out height, out width]
};

void signed_product(const SignedProduct& product);

// In the order of SIGNED_LOOPS in bop2nd_fast/backends.py.
enum class SignedLoop : int { kFewRows, kSumTables, kByteTiles, kByteLanes };

// Which loop serves such a product with the instruction set in use. `dense`: every output pixel sees all
// channels of just one input pixel.
SignedLoop signed_loop(int64_t out_pixels, bool dense, bool real);

// scale[row] = max |x| / 127 (or one for all) and q = clamp(round(x / scale), -127, 127), of contiguous rows.
// Returns how many rows (1 of one) are not finite: then nothing of q and scale counts.
int64_t quantize_rows(Dtype dtype, const void* x, int64_t n_rows, int64_t length, bool per_row, int8_t* q,
                      float* scale);

}  // namespace bop2nd

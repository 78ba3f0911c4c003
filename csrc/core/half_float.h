// SPDX-License-Identifier: Apache-2.0
// fp16 and bf16 <-> fp32 without special instructions; rounding to nearest even, denormals kept. For the
// host: a GPU has instructions for it.
#pragma once

#include <cstring>

#include "dtype.h"

namespace bop2nd {

BOP2ND_HD float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

BOP2ND_HD uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

BOP2ND_HD float to_float(float x) { return x; }

BOP2ND_HD float to_float(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

BOP2ND_HD float to_float(Float16 x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  // The exponent bias differs by 112; scaling by 2^112 does both normal and denormal numbers exactly.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

template <class T>
T from_float(float x);

template <>
BOP2ND_HD float from_float<float>(float x) {
  return x;
}

template <>
BOP2ND_HD BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits = bits_of_float(x);
  if (x != x) return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
BOP2ND_HD Float16 from_float<Float16>(float x) {
  uint32_t bits = bits_of_float(x);
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= 0x477FF000u) {  // 65520 and more round to infinity
    half = 0x7C00u;
  } else if (magnitude <
             0x38800000u) {  // below 2^-14: adding 0.5 aligns the last fp16 bit with the last fp32 bit
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
}

}  // namespace bop2nd

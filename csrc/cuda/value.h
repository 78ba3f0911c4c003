// SPDX-License-Identifier: Apache-2.0
// Elements of real tensors, one and four at a time, as fp32: by instruction on the device, by integer
// arithmetic on the host (core/half_float.h). Rounding to nearest even.
#pragma once

#include "../core/half_float.h"

namespace bop2nd::cuda {

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(8) Half4 {
  uint16_t v[4];
};
struct alignas(16) Word4 {
  uint32_t v[4];
};
struct alignas(8) Word2 {
  uint32_t v[2];
};

BOP2ND_HD float value_of_half(uint16_t bits, Dtype type) {
#if defined(__CUDA_ARCH__)
  if (type == Dtype::kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  return type == Dtype::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
#endif
}

BOP2ND_HD uint16_t half_of_value(float x, Dtype type) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  if (type == Dtype::kBFloat16) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  return bits;
#else
  return type == Dtype::kBFloat16 ? from_float<BFloat16>(x).bits : from_float<Float16>(x).bits;
#endif
}

BOP2ND_HD float load_value(const void* base, Dtype type, int64_t index) {
  if (type == Dtype::kFloat32) return static_cast<const float*>(base)[index];
  return value_of_half(static_cast<const uint16_t*>(base)[index], type);
}

BOP2ND_HD void store_value(void* base, Dtype type, int64_t index, float x) {
  if (type == Dtype::kFloat32) {
    static_cast<float*>(base)[index] = x;
  } else {
    static_cast<uint16_t*>(base)[index] = half_of_value(x, type);
  }
}

// Four neighbours at once; `index` a multiple of 4 and `base` aligned to 16 bytes.
BOP2ND_HD Float4 load_value4(const void* base, Dtype type, int64_t index) {
  if (type == Dtype::kFloat32) return static_cast<const Float4*>(base)[index / 4];
  Half4 half = static_cast<const Half4*>(base)[index / 4];
  Float4 x;
  for (int i = 0; i < 4; ++i) x.v[i] = value_of_half(half.v[i], type);
  return x;
}

BOP2ND_HD void store_value4(void* base, Dtype type, int64_t index, const Float4& x) {
  if (type == Dtype::kFloat32) {
    static_cast<Float4*>(base)[index / 4] = x;
    return;
  }
  Half4 half;
  for (int i = 0; i < 4; ++i) half.v[i] = half_of_value(x.v[i], type);
  static_cast<Half4*>(base)[index / 4] = half;
}

}  // namespace bop2nd::cuda

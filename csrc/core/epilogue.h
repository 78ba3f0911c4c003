// SPDX-License-Identifier: Apache-2.0
// THE EPILOGUE: what becomes of the dot products of all pixels and outputs. Values, sign words, or both.
//
//   dot'  = clamp(dot, low, high)
//   value = act(dot' (* scale[o]) (+ shift[o]) (+ residual[p][o])) (+ post_shift[o])
//   bit   = dot < threshold[o], without thresholds value (+ sign_shift[o]) < 0        1 means -1
//
// act: none; ReLU, what is below 0 becomes 0; PReLU, what is below 0 is multiplied by slope[o]. In fp32,
// every operation rounded on its own; values are rounded to `dtype` at the end. `reference.epilogue` says the
// same. An operand more for each output: its name in BOP2ND_PER_OUTPUT and its line in `finish`; the bindings
// (register_product.h) and the runtime have it from there.
// Limits: no torch; compiles for host and device.
#pragma once

#include "dtype.h"

namespace bop2nd {

// The operands that are fp32 [outputs], in the order of the operators' schemas (kernels/outputs.py).
#define BOP2ND_PER_OUTPUT(APPLY) APPLY(scale) APPLY(shift) APPLY(slope) APPLY(post_shift) APPLY(sign_shift)

struct Epilogue {
  Dtype dtype = Dtype::kFloat32;       // of `values` and `residual`
  void* values = nullptr;              // [pixels, outputs]
  uint32_t* signs = nullptr;           // [pixels, words_for(outputs)]
  const int32_t* threshold = nullptr;  // [outputs]
  const void* residual = nullptr;      // like `values`
  int32_t low = INT32_MIN, high = INT32_MAX;
  bool relu = false;
#define BOP2ND_FIELD(name) const float* name = nullptr;
  BOP2ND_PER_OUTPUT(BOP2ND_FIELD)
#undef BOP2ND_FIELD

  // Whether there is more than scale, shift, residual and thresholds.
  BOP2ND_HD bool has_more() const {
    return low != INT32_MIN || high != INT32_MAX || relu || slope || post_shift || sign_shift;
  }
  // Whether values are anything but the dots.
  BOP2ND_HD bool computes() const { return scale || shift || residual || has_more(); }
  BOP2ND_HD bool only_values() const { return !signs && !computes(); }
};

// The values of n neighbouring outputs from `output` on, of which `left` exist; the others repeat the last
// that does, so that nothing is read past the end. `residual`: their own, looked at where the epilogue has
// one. What holds for all (is there a scale?) is asked once for the n.
template <int n>
BOP2ND_HD void finish(const Epilogue& e, const int32_t (&dots)[n], int64_t output, int left,
                      const float (&residual)[n], float (&x)[n]) {
  auto of = [output, left](const float* operand, int i) {
    return operand[output + (i < left ? i : left - 1)];
  };
#pragma unroll
  for (int i = 0; i < n; ++i) {
    int32_t dot = dots[i] < e.low ? e.low : dots[i] > e.high ? e.high : dots[i];
    x[i] = static_cast<float>(dot);
  }
  if (e.scale) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] * of(e.scale, i);
  }
  if (e.shift) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] + of(e.shift, i);
  }
  if (e.residual) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] + residual[i];
  }
  if (e.relu) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];
  }
  if (e.slope) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] < 0.0f ? x[i] * of(e.slope, i) : x[i];
  }
  if (e.post_shift) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = x[i] + of(e.post_shift, i);
  }
}

// The value of one element.
BOP2ND_HD float finish(const Epilogue& e, int32_t dot, int64_t output, float residual) {
  const int32_t dots[1] = {dot};
  const float residuals[1] = {residual};
  float x[1];
  finish(e, dots, output, 1, residuals, x);
  return x[0];
}

// Its sign bit.
BOP2ND_HD bool is_negative(const Epilogue& e, int32_t dot, float value, int64_t output) {
  if (e.threshold) return dot < e.threshold[output];
  return (e.sign_shift ? value + e.sign_shift[output] : value) < 0.0f;
}

}  // namespace bop2nd

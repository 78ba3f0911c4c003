// SPDX-License-Identifier: Apache-2.0
// Windows over images: which taps meet a pixel.
#pragma once

#include "plan.h"

namespace bop2nd::runtime {

// Of one output along one axis: the position of tap 0, and the taps inside the image.
struct Taps {
  int64_t at, begin, end;
};
Taps taps_at(const Geometry& g, int axis, int64_t size, int64_t output);

Geometry pool_geometry(const Layer& layer);
// Over rows of n numbers at these offsets, without weights.
RealWindow unweighted(const float* x, const std::vector<int64_t>& offsets, int64_t n, float* to);
Value plan_pool_bits(Planner& planner, const Layer& layer, const Tensor& words);

}  // namespace bop2nd::runtime

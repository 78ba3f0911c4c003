// SPDX-License-Identifier: Apache-2.0
// What the product kernels would do on a chip, from the very plan that launches them: plain C symbols for
// bop2nd_fast/gpu_dispatch.py (ctypes). Knows neither CUDA nor torch, so it is part of `_C` and answers on
// every machine.
#include <cstdio>
#include <iterator>

#include "binary_plan.h"

#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

// Which kernel a product would run on a chip, in words. `arch` as 80, 90, ...; conv: n, h, w, channels,
// outputs, kernel height and width, then (vertical, horizontal) stride, padding and dilation, groups, padding
// value; linear: rows, features, outputs. Returns the length of the text, or -1.
BOP2ND_EXPORT int bop2nd_gpu_explain(const int64_t* sizes, int n_sizes, int arch, int n_multiprocessors,
                                     char* text, int n_chars) {
  using namespace bop2nd::cuda;
  ConvShape shape;
  auto at = [sizes](int i) { return static_cast<int>(sizes[i]); };
  if (n_sizes == 3) {
    shape = ConvShape::linear(at(0), at(1), at(2));
  } else if (n_sizes == 15 && at(13) > 0) {
    shape = ConvShape(at(0), Axis(at(1), at(5), at(7), at(9), at(11)),
                      Axis(at(2), at(6), at(8), at(10), at(12)), at(13), at(3) / at(13), at(4) / at(13));
  } else {
    return -1;
  }
  MatmulPlan plan = plan_matmul(shape, n_sizes == 15 ? at(14) : 1, {arch * 10, n_multiprocessors});
  return std::snprintf(text, static_cast<size_t>(n_chars), "%s", plan.describe().c_str());
}

BOP2ND_EXPORT int bop2nd_gpu_limit_count(void) {
  return static_cast<int>(std::size(bop2nd::cuda::limits::kAll));
}

// Entry `i` of dispatch_table.h; `part` 0: what it is about, 1: the reason, 2: what measured it (or null).
BOP2ND_EXPORT const char* bop2nd_gpu_limit_text(int i, int part) {
  const bop2nd::cuda::DispatchLimit& limit = *bop2nd::cuda::limits::kAll[i];
  return part == 0 ? limit.what : part == 1 ? limit.reason : limit.measured;
}

BOP2ND_EXPORT int bop2nd_gpu_limit_value(int i) { return bop2nd::cuda::limits::kAll[i]->value; }

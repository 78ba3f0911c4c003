// SPDX-License-Identifier: Apache-2.0
// What the product kernels would do on a chip, from the very plan that launches them: plain C symbols for
// bop2nd_fast/gpu_dispatch.py (ctypes). Knows neither CUDA nor torch, so it is part of `_C` and answers on
// every machine.
#include <cstdio>
#include <iterator>

#include "binary_plan.h"

#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

int tell(const char* what, char* text, int n_chars) {
  return std::snprintf(text, static_cast<size_t>(n_chars), "%s", what);
}

}  // namespace

// What a plan chose, as numbers: gpu_dispatch.py has the same struct.
struct PlanNumbers {
  int32_t tile_rows, tile_columns, math, n_slices;
};

// Which kernel a product would run on a chip, also in words. `arch` as 80, 90, ...; `n_shape_bytes`: how
// large the caller believes a shape to be. Returns the length of the text, or -1: then it says what is wrong.
BOP2ND_EXPORT int bop2nd_gpu_explain(const bop2nd::ConvShape* shape, int n_shape_bytes, int arch,
                                     int n_multiprocessors, PlanNumbers* numbers, char* text, int n_chars) {
  using namespace bop2nd::cuda;
  try {
    if (n_shape_bytes != sizeof(*shape)) throw std::invalid_argument("another build's shape");
    bop2nd::ConvShape kept = bop2nd::checked(*shape);
    if (!ConvView::fits(kept))
      throw std::invalid_argument("more rows, outputs or pixels than a GPU kernel takes");
    Chip chip;
    chip.arch = arch * 10, chip.n_multiprocessors = n_multiprocessors;
    MatmulPlan plan = plan_matmul(ConvView(kept), chip);
    TileSize tile = tile_size(plan.kernel);
    numbers->tile_rows = tile.rows, numbers->tile_columns = tile.columns;
    numbers->math = static_cast<int>(plan.math), numbers->n_slices = plan.split.n_slices;
    return tell(plan.describe().c_str(), text, n_chars);
  } catch (const std::invalid_argument& refused) {
    tell(refused.what(), text, n_chars);
    return -1;
  }
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

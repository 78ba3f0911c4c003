// SPDX-License-Identifier: Apache-2.0
// The yardstick of the product kernels: the chip's rate of the very instruction they use, back to back from
// registers, eight independent accumulators a warp, no memory. One m16n8k256 step (on chips that decode to
// bytes: eight m16n8k32) is 32768 multiply-accumulates.
#include "device_block.cuh"
#include "error.cuh"
#include "launch.h"

namespace bop2nd::cuda {

constexpr int kPeakThreads = 256, kPeakChains = 8;

struct PeakThread {
  int32_t count[1][kPeakChains][4];
};

struct PeakFragments {
  uint32_t a[1][4];
  uint32_t b[kPeakChains][2];
};

__global__ void __launch_bounds__(kPeakThreads) mma_peak(int32_t* out, int n_iterations) {
  DeviceBlock block;
  PeakThread t{};
  PeakFragments f;
  for (int r = 0; r < 4; ++r) f.a[0][r] = threadIdx.x * 2654435761u + static_cast<uint32_t>(r);
  for (int j = 0; j < kPeakChains; ++j)
    for (int r = 0; r < 2; ++r) f.b[j][r] = threadIdx.x + static_cast<uint32_t>(8 * j + r);
#pragma unroll 4
  for (int i = 0; i < n_iterations; ++i) block.multiply<kDeviceMath>(t, f);
  int32_t sum = 0;
  for (int j = 0; j < kPeakChains; ++j)
    for (int r = 0; r < 4; ++r) sum += t.count[0][j][r];
  if (sum == -1) *out = sum;  // never: counts are not negative; keeps the loop alive
}

Error launch_mma_peak(int32_t* out, int n_iterations, int device, double* n_macs, Stream stream) {
  Chip chip;
  if (Error e = chip_of(device, &chip)) return e;
  int n_blocks = 4 * chip.n_multiprocessors;
  mma_peak<<<static_cast<unsigned>(n_blocks), kPeakThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      out, n_iterations);
  double per_instruction = chip.math() == Math::kAndBytes ? 16.0 * 8 * 32 : 16.0 * 8 * 256;
  *n_macs = per_instruction * kPeakChains * (kPeakThreads / 32) * n_blocks * n_iterations;
  return launch_error();
}

}  // namespace bop2nd::cuda

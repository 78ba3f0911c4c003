// SPDX-License-Identifier: Apache-2.0
// The step's kernels: see bop_step.h. One per storage of the moments, with and without the second moment.
#include "device_block.cuh"
#include "error.cuh"
#include "launch.h"

namespace bop2nd::cuda {

template <Dtype kState, bool kSecond>
__global__ void __launch_bounds__(StepBatch::kThreads, 3) bop_step(const __grid_constant__ StepBatch batch) {
  DeviceBlock block;
  step_block<kState, kSecond>(block, batch, static_cast<int>(blockIdx.x));
}

Error launch_step(const StepBatch& batch, int n_blocks, Stream stream) {
  auto kernel =
      batch.state_type == Dtype::kFloat32
          ? (batch.second_moment ? bop_step<Dtype::kFloat32, true> : bop_step<Dtype::kFloat32, false>)
          : (batch.second_moment ? bop_step<Dtype::kBFloat16, true> : bop_step<Dtype::kBFloat16, false>);
  constexpr size_t kSharedBytes = 16;
  kernel<<<static_cast<unsigned>(n_blocks), StepBatch::kThreads, kSharedBytes,
           static_cast<cudaStream_t>(stream)>>>(batch);
  return launch_error();
}

}  // namespace bop2nd::cuda

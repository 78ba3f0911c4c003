// SPDX-License-Identifier: Apache-2.0
// What register_cuda.cpp may ask of the GPU: plain C++, no CUDA header and no torch header. Every function
// enqueues work on `stream` of the current device, waits for nothing, and returns null or what went wrong.
#pragma once

#include "binary_plan.h"
#include "bop_step.h"
#include "pack_bits.h"

namespace bop2nd::cuda {

using Stream = void*;  // cudaStream_t
using Error = const char*;

// Asks the driver once per device; the current device must be `device`.
Error chip_of(int device, Chip* chip);

Error launch_matmul(const MatmulPlan&, const MatmulProblem&, const TermsProblem&, Stream);
Error launch_step(const StepBatch&, int n_blocks, Stream);
Error launch_pack(const PackProblem&, Stream);
Error launch_unpack(const UnpackProblem&, Stream);
Error launch_mask(const UnpackProblem&, Stream);
// A yardstick for benchmarks: enqueues `n_iterations` of the product's instruction on every multiprocessor
// and says how many multiply-accumulates they stand for. `out` is one int32 that is not written.
Error launch_mma_peak(int32_t* out, int n_iterations, int device, double* n_macs, Stream);
Error clear_memory(void* at, int64_t n_bytes, Stream);

}  // namespace bop2nd::cuda

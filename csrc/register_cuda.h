// SPDX-License-Identifier: Apache-2.0
// What the files of the CUDA binding share. They go from tensors to the problems of csrc/cuda, know torch
// through its stable ABI and the kernels through cuda/launch.h, and need neither CUDA's nor torch's CUDA
// headers. Built into a library of its own, bop2nd_fast._C_cuda, because it only loads where torch has CUDA.
//
// Work goes to the current stream of the tensors' device; nothing waits for the device, so every operator can
// be captured in a graph. Users' mistakes are reported in bop2nd_fast/ops, the checks here only guard memory.
// Tests build it with BOP2ND_EMULATED: kernels on emulated blocks, registered for host tensors.
#pragma once

#define USE_CUDA  // declares the shim that names the current stream
#include "register_tensor.h"

#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <limits>

#include "cuda/launch.h"

#ifdef BOP2ND_EMULATED
#define BOP2ND_NAMESPACE bop2nd_emulated
#define BOP2ND_DEVICE CPU
#else
#define BOP2ND_NAMESPACE bop2nd
#define BOP2ND_DEVICE CUDA
#endif

namespace bop2nd::cuda {

using namespace bop2nd::binding;

constexpr int64_t kMax32 = std::numeric_limits<int32_t>::max();
inline std::atomic<int64_t> n_calls{0};  // of operators

// The device of a tensor, made current while this lives, and its current stream.
struct Place {
#ifdef BOP2ND_EMULATED
  explicit Place(const Tensor&) { ++n_calls; }
  int device = 0;
  Stream stream = nullptr;
#else
  explicit Place(const Tensor& t) : device(index_of(t)), guard(device) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    ++n_calls;
  }
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream = nullptr;

 private:
  // The dispatcher comes here as soon as one of the operands is on a GPU; this one need not be.
  static int index_of(const Tensor& t) {
    BOP2ND_REQUIRE(t.is_cuda(), "the first operand must be on the GPU, as another one is");
    return t.get_device_index();
  }
#endif
};

inline void check(Error error, const char* what) { STD_TORCH_CHECK(error == nullptr, what, ": ", error); }

// Packs x along dim (register_cuda_pack.cpp); returns (signs, mask or an empty tensor), the packed axis last.
std::tuple<Tensor, Tensor> pack_tensor(const Tensor& input, int64_t dim, int64_t groups, bool with_mask);

}  // namespace bop2nd::cuda

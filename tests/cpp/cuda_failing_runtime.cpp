// SPDX-License-Identifier: Apache-2.0
// The launchers of csrc/cuda (compiled by nvcc) on a CUDA runtime of which one call fails, each in turn:
// every failure comes back as its text, and is not left behind for the next one who asks. Needs no GPU.
// Prints what was forgotten.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

#include "../../csrc/cuda/launch.h"

namespace {

int calls = 0, failing = -1;
cudaError_t last = cudaSuccess;

cudaError_t served() {
  if (calls++ != failing) return cudaSuccess;
  return last = cudaErrorNoKernelImageForDevice;
}

}  // namespace

// What the launchers call; what nvcc makes of <<<>>> (its declarations differ between releases) ends in a
// launch.
extern "C" {
cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "none" : "no image"; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return served(); }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return served(); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 132;
  return served();
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return served();
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return served(); }
int __cudaLaunchKernel(...) { return served(); }
int __cudaGetKernel(...) { return cudaSuccess; }
unsigned __cudaPushCallConfiguration(...) { return 0; }
int __cudaPopCallConfiguration(...) { return cudaSuccess; }
void** __cudaRegisterFatBinary(...) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(...) {}
void __cudaUnregisterFatBinary(...) {}
void __cudaRegisterFunction(...) {}
char __cudaInitModule(...) { return 0; }
}

namespace {

using namespace bop2nd::cuda;

int forgotten = 0;
int device = 0;  // another one for every launch: a device is asked once what it is

void require(bool kept, const char* name, const char* what) {
  if (kept) return;
  std::printf("%s, call %d fails: %s\n", name, failing, what);
  ++forgotten;
}

// launch(device) makes `n_calls` calls of the runtime when all goes well.
template <class Launch>
void check(const char* name, int n_calls, const Launch& launch) {
  for (failing = 0; failing < n_calls; ++failing) {
    calls = 0;
    Error error = launch(device++);
    require(error && !std::strcmp(error, "no image"), name, "nobody is told");
    require(cudaGetLastError() == cudaSuccess, name, "its error is left behind");
  }
  failing = -1, calls = 0;
  require(launch(device++) == nullptr, name, "an error of nothing");
  require(calls == n_calls, name, "other calls of the runtime than this test knows");
}

void check_products() {
  for (Kernel kernel : {Kernel::kSkinny, Kernel::kSmallTile, Kernel::kTallTile, Kernel::kLargeTile}) {
    bool large = kernel == Kernel::kTallTile || kernel == Kernel::kLargeTile;  // asks for shared memory
    for (bool terms : {false, true}) {
      MatmulPlan plan;
      plan.kernel = kernel, plan.needs_terms = terms;
      check("launch_matmul", 1 + large + terms,
            [&](int) { return launch_matmul(plan, MatmulProblem{}, TermsProblem{}, nullptr); });
    }
  }
}

void check_packing() {
  for (auto type : {bop2nd::Dtype::kFloat32, bop2nd::Dtype::kBFloat16, bop2nd::Dtype::kFloat16}) {
    UnpackProblem rows;
    rows.type = type;
    check("launch_unpack", 1, [&](int) { return launch_unpack(rows, nullptr); });
    check("launch_mask", 1, [&](int) { return launch_mask(rows, nullptr); });
    PackProblem pack;
    pack.type = type;
    check("launch_pack", 1, [&](int) { return launch_pack(pack, nullptr); });
  }
}

}  // namespace

int main() {
  Chip chip;
  check("chip_of", 2, [&](int device) { return chip_of(device, &chip); });
  failing = 1, calls = 0;
  bool refused = chip_of(63, &chip) != nullptr;
  failing = -1, calls = 0;
  bool asked = chip_of(63, &chip) == nullptr && calls == 2,
       kept = chip_of(63, &chip) == nullptr && calls == 2;
  require(refused && asked && kept, "chip_of", "what failed is asked again, what is known is not");
  double n_macs = 0;
  check("launch_mma_peak", 3,
        [&](int device) { return launch_mma_peak(nullptr, 1, device, &n_macs, nullptr); });
  check("clear_memory", 1, [](int) { return clear_memory(nullptr, 0, nullptr); });
  check("launch_step", 1, [](int) { return launch_step(StepBatch{}, 1, nullptr); });
  check_products();
  check_packing();
  return forgotten;
}

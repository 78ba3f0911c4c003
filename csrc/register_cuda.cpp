// SPDX-License-Identifier: Apache-2.0
// The module bop2nd_fast._C_cuda (see register_cuda.h) and its control symbols.
#include "register_cuda.h"

// Control symbols for bop2nd_fast/backends.py (ctypes).
#define BOP2ND_EXPORT extern "C" __attribute__((visibility("default")))

// Operator calls served so far; tests check that what they forced really ran.
BOP2ND_EXPORT int64_t bop2nd_cuda_calls(void) { return bop2nd::cuda::n_calls.load(); }

// Why the kernels cannot run on the current device `device` (no code for it, say), or null if they can.
BOP2ND_EXPORT const char* bop2nd_cuda_unusable(int device) {
  bop2nd::cuda::Chip chip;
  return bop2nd::cuda::chip_of(device, &chip);
}

// Enqueues the product kernels' instruction back to back on the current device `device`; returns the
// multiply-accumulates it stands for, or -1. `out`: device memory of one int32. For benchmarks.
BOP2ND_EXPORT double bop2nd_cuda_mma_peak(void* out, int n_iterations, int device, void* stream) {
  double n_macs = 0;
  auto error =
      bop2nd::cuda::launch_mma_peak(static_cast<int32_t*>(out), n_iterations, device, &n_macs, stream);
  return error ? -1.0 : n_macs;
}

#ifdef BOP2ND_EMULATED
#define BOP2ND_MODULE_INIT PyInit__C_emulated
#else
#define BOP2ND_MODULE_INIT PyInit__C_cuda
#endif
PyMODINIT_FUNC BOP2ND_MODULE_INIT(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

// SPDX-License-Identifier: Apache-2.0
// What a call of CUDA's runtime returned, in words. Every result of a runtime call goes through here.
#pragma once

#include <cuda_runtime.h>

namespace bop2nd::cuda {

// Null, or what went wrong. A failing call also leaves its error behind for cudaGetLastError; it is taken
// away, or else the next launch check of anybody (torch's) would raise it for an innocent kernel.
inline const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

// Of the launch just made.
inline const char* launch_error() { return text_of(cudaGetLastError()); }

}  // namespace bop2nd::cuda

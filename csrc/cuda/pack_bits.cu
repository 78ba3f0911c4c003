// SPDX-License-Identifier: Apache-2.0
// Kernels that pack, unpack and apply a mask: see pack_bits.h. One kernel per path and element type.
#include "device_block.cuh"
#include "error.cuh"
#include "launch.h"

namespace bop2nd::cuda {

template <Dtype kType, PackProblem::Path kPath>
__global__ void __launch_bounds__(PackProblem::kThreads) pack_bits(const __grid_constant__ PackProblem p) {
  DeviceBlock block;
  if constexpr (kPath == PackProblem::Path::kFlat) {
    pack_flat<kType>(block, p, blockIdx.x);
  } else if constexpr (kPath == PackProblem::Path::kRows) {
    pack_rows<kType>(block, p, blockIdx.x);
  } else {
    pack_columns<kType>(block, p, blockIdx.x);
  }
}

template <Dtype kType>
__global__ void __launch_bounds__(UnpackProblem::kThreads)
    unpack_bits(const __grid_constant__ UnpackProblem p) {
  DeviceBlock block;
  unpack_block<kType>(block, p, blockIdx.x);
}

template <class Quad>
__global__ void __launch_bounds__(UnpackProblem::kThreads)
    apply_mask(const __grid_constant__ UnpackProblem p) {
  DeviceBlock block;
  mask_block<Quad>(block, p, blockIdx.x);
}

namespace {

template <Dtype kType>
void enqueue_pack(const PackProblem& p, cudaStream_t stream) {
  auto kernel = p.path == PackProblem::Path::kFlat   ? pack_bits<kType, PackProblem::Path::kFlat>
                : p.path == PackProblem::Path::kRows ? pack_bits<kType, PackProblem::Path::kRows>
                                                     : pack_bits<kType, PackProblem::Path::kColumns>;
  kernel<<<static_cast<unsigned>(p.n_blocks()), PackProblem::kThreads, 0, stream>>>(p);
}

}  // namespace

Error launch_pack(const PackProblem& p, Stream stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.type == Dtype::kFloat32) {
    enqueue_pack<Dtype::kFloat32>(p, stream);
  } else if (p.type == Dtype::kBFloat16) {
    enqueue_pack<Dtype::kBFloat16>(p, stream);
  } else {
    enqueue_pack<Dtype::kFloat16>(p, stream);
  }
  return launch_error();
}

Error launch_unpack(const UnpackProblem& p, Stream stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  auto kernel = p.type == Dtype::kFloat32    ? unpack_bits<Dtype::kFloat32>
                : p.type == Dtype::kBFloat16 ? unpack_bits<Dtype::kBFloat16>
                                             : unpack_bits<Dtype::kFloat16>;
  kernel<<<static_cast<unsigned>(p.n_blocks()), UnpackProblem::kThreads, 0, stream>>>(p);
  return launch_error();
}

Error launch_mask(const UnpackProblem& p, Stream stream_) {
  auto kernel = p.type == Dtype::kFloat32 ? apply_mask<Word4> : apply_mask<Half4>;
  kernel<<<static_cast<unsigned>(p.n_blocks()), UnpackProblem::kThreads, 0,
           static_cast<cudaStream_t>(stream_)>>>(p);
  return launch_error();
}

}  // namespace bop2nd::cuda

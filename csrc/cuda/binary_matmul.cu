// SPDX-License-Identifier: Apache-2.0
// Kernels of the binary product: binary_matmul.h (tensor cores), binary_skinny.h (popcounts) and
// binary_terms.h (what does not depend on the pair), and their launcher. Kernels are named
// binary_matmul_<tile>_<vector>; the arithmetic follows from the architecture compiled for (fragment.h).
#include <atomic>
#include <type_traits>

#include "device_block.cuh"
#include "error.cuh"
#include "launch.h"

namespace bop2nd::cuda {

template <class Tile, int kVector, int kBlocksPerMultiprocessor>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksPerMultiprocessor)
    binary_matmul(const __grid_constant__ MatmulProblem p) {
  DeviceBlock block;
  using Used = std::conditional_t<kDeviceLean, typename Tile::Lean, Tile>;
  MatmulBlock<Used, kDeviceMath, kVector, DeviceBlock> work(block, p, static_cast<int>(blockIdx.x),
                                                            static_cast<int>(blockIdx.y));
  work.run();
}

template <int kVector>
__global__ void __launch_bounds__(SkinnyTile::kThreads)
    binary_skinny(const __grid_constant__ MatmulProblem p) {
  DeviceBlock block;
  skinny_block<kVector>(block, p, static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(TermsProblem::kThreads)
    binary_terms(const __grid_constant__ TermsProblem p) {
  DeviceBlock block;
  terms_block(block, p, blockIdx.x);
}

namespace {

using MatmulKernel = void (*)(MatmulProblem);

struct Choice {
  MatmulKernel kernel;
  int threads, shared_bytes;
};

template <class Tile, int kBlocks>
Choice tile_kernel(const MatmulPlan& plan) {
  int vector_words = plan.vector_words;
  MatmulKernel kernel = vector_words == 4   ? binary_matmul<Tile, 4, kBlocks>
                        : vector_words == 2 ? binary_matmul<Tile, 2, kBlocks>
                                            : binary_matmul<Tile, 1, kBlocks>;
  Choice choice{};
  choice.kernel = kernel, choice.threads = Tile::kThreads;
  choice.shared_bytes = plan.lean ? Tile::Lean::kSharedBytes : Tile::kSharedBytes;
  return choice;
}

Choice choose(const MatmulPlan& plan) {
  if (plan.kernel == Kernel::kSkinny) {
    Choice choice{};
    choice.kernel = plan.vector_words == 4 ? binary_skinny<4> : binary_skinny<1>;
    choice.threads = SkinnyTile::kThreads, choice.shared_bytes = SkinnyTile::kSharedBytes;
    return choice;
  }
  if (plan.kernel == Kernel::kLargeTile) return tile_kernel<LargeTile, 2>(plan);
  if (plan.kernel == Kernel::kTallTile) return tile_kernel<TallTile, 2>(plan);
  return tile_kernel<SmallTile, 4>(plan);
}

// More than 48 KiB of shared memory has to be asked for, once per kernel and device.
Error allow_shared_memory(const Choice& choice) {
  if (choice.shared_bytes <= 48 * 1024) return nullptr;
  return text_of(cudaFuncSetAttribute(reinterpret_cast<const void*>(choice.kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, choice.shared_bytes));
}

}  // namespace

Error chip_of(int device, Chip* chip) {
  constexpr int kMaxDevices = 64, kArchs = 4096;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet; else multiprocessors * kArchs + arch
  bool cached = device >= 0 && device < kMaxDevices;
  int packed = cached ? known[device].load() : 0;
  if (packed == 0) {
    int multiprocessors = 0;
    cudaFuncAttributes attributes;
    if (Error e = text_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)))
      return e;
    // The virtual architecture the kernel in use was compiled for: what __CUDA_ARCH__ was.
    if (Error e = text_of(cudaFuncGetAttributes(&attributes, binary_matmul<SmallTile, 4, 4>))) return e;
    packed = multiprocessors * kArchs + attributes.ptxVersion * 10;
    if (cached) known[device].store(packed);
  }
  chip->arch = packed % kArchs, chip->n_multiprocessors = packed / kArchs;
  return nullptr;
}

Error launch_matmul(const MatmulPlan& plan, const MatmulProblem& problem, const TermsProblem& terms,
                    Stream stream_) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (plan.needs_terms) {
    binary_terms<<<static_cast<unsigned>(terms.n_blocks()), TermsProblem::kThreads,
                   TermsProblem::kSharedBytes, stream>>>(terms);
    if (Error e = launch_error()) return e;
  }
  Choice choice = choose(plan);
  if (Error e = allow_shared_memory(choice)) return e;
  dim3 grid(static_cast<unsigned>(plan.n_tiles), static_cast<unsigned>(plan.split.n_slices));
  choice.kernel<<<grid, static_cast<unsigned>(choice.threads), static_cast<size_t>(choice.shared_bytes),
                  stream>>>(problem);
  return launch_error();
}

Error clear_memory(void* at, int64_t n_bytes, Stream stream) {
  return text_of(cudaMemsetAsync(at, 0, static_cast<size_t>(n_bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/launch.h on emulated blocks and host memory: with register_cuda.cpp (BOP2ND_EMULATED) it makes a
// library whose operators run the CUDA binding, planning and kernel bodies on a machine without a GPU.
#include <cstring>
#include <memory>

#include "../../csrc/cuda/launch.h"
#include "cuda_host_block.h"

namespace bop2nd::cuda {
namespace {

Chip pretended;

template <class Tile, Math math, int kVector>
void run_tiles(const MatmulPlan& plan, const MatmulProblem& p) {
  for (int64_t i = 0; i < plan.n_blocks(); ++i) {
    HostBlock block(Tile::kSharedBytes);
    auto work = std::make_unique<MatmulBlock<Tile, math, kVector, HostBlock>>(
        block, p, static_cast<int>(i % plan.n_tiles), static_cast<int>(i / plan.n_tiles));
    work->run();
  }
}

template <class Tile, Math math>
void run_vector(const MatmulPlan& plan, const MatmulProblem& p) {
  if (plan.vector_words == 4) return run_tiles<Tile, math, 4>(plan, p);
  if (plan.vector_words == 2) return run_tiles<Tile, math, 2>(plan, p);
  run_tiles<Tile, math, 1>(plan, p);
}

template <class Tile>
void run_math(const MatmulPlan& plan, const MatmulProblem& p) {
  using Lean = typename Tile::Lean;
  if constexpr (!std::is_same_v<Tile, Lean>) {
    if (plan.lean) return run_math<Lean>(plan, p);
  }
  if (plan.math == Math::kXorBits) return run_vector<Tile, Math::kXorBits>(plan, p);
  if (plan.math == Math::kAndBits) return run_vector<Tile, Math::kAndBits>(plan, p);
  run_vector<Tile, Math::kAndBytes>(plan, p);
}

template <Dtype kType>
void run_pack(const PackProblem& p) {
  for (int64_t i = 0; i < p.n_blocks(); ++i) {
    HostBlock block(16);
    if (p.path == PackProblem::Path::kFlat) {
      pack_flat<kType>(block, p, i);
    } else if (p.path == PackProblem::Path::kRows) {
      pack_rows<kType>(block, p, i);
    } else {
      pack_columns<kType>(block, p, i);
    }
  }
}

}  // namespace

Error chip_of(int, Chip* chip) {
  *chip = pretended;
  return nullptr;
}

Error launch_matmul(const MatmulPlan& plan, const MatmulProblem& p, const TermsProblem& terms, Stream) {
  for (int64_t i = 0; plan.needs_terms && i < terms.n_blocks(); ++i) {
    HostBlock block(TermsProblem::kSharedBytes);
    terms_block(block, terms, i);
  }
  if (plan.kernel == Kernel::kLargeTile) {
    run_math<LargeTile>(plan, p);
  } else if (plan.kernel == Kernel::kTallTile) {
    run_math<TallTile>(plan, p);
  } else if (plan.kernel == Kernel::kSmallTile) {
    run_math<SmallTile>(plan, p);
  } else {
    for (int64_t i = 0; i < plan.n_tiles; ++i) {
      HostBlock block(SkinnyTile::kSharedBytes);
      plan.vector_words == 4 ? skinny_block<4>(block, p, static_cast<int>(i))
                             : skinny_block<1>(block, p, static_cast<int>(i));
    }
  }
  return nullptr;
}

Error launch_step(const StepBatch& batch, int n_blocks, Stream) {
  for (int i = 0; i < n_blocks; ++i) {
    HostBlock block(16);
    if (batch.state_type == Dtype::kFloat32) {
      batch.second_moment ? step_block<Dtype::kFloat32, true>(block, batch, i)
                          : step_block<Dtype::kFloat32, false>(block, batch, i);
    } else {
      batch.second_moment ? step_block<Dtype::kBFloat16, true>(block, batch, i)
                          : step_block<Dtype::kBFloat16, false>(block, batch, i);
    }
  }
  return nullptr;
}

Error launch_pack(const PackProblem& p, Stream) {
  if (p.type == Dtype::kFloat32) run_pack<Dtype::kFloat32>(p);
  if (p.type == Dtype::kBFloat16) run_pack<Dtype::kBFloat16>(p);
  if (p.type == Dtype::kFloat16) run_pack<Dtype::kFloat16>(p);
  return nullptr;
}

Error launch_unpack(const UnpackProblem& p, Stream) {
  for (int64_t i = 0; i < p.n_blocks(); ++i) {
    HostBlock block(16);
    if (p.type == Dtype::kFloat32) unpack_block<Dtype::kFloat32>(block, p, i);
    if (p.type == Dtype::kBFloat16) unpack_block<Dtype::kBFloat16>(block, p, i);
    if (p.type == Dtype::kFloat16) unpack_block<Dtype::kFloat16>(block, p, i);
  }
  return nullptr;
}

Error launch_mask(const UnpackProblem& p, Stream) {
  for (int64_t i = 0; i < p.n_blocks(); ++i) {
    HostBlock block(16);
    p.type == Dtype::kFloat32 ? mask_block<Word4>(block, p, i) : mask_block<Half4>(block, p, i);
  }
  return nullptr;
}

Error launch_mma_peak(int32_t*, int, int, double*, Stream) { return "an emulated chip has no peak"; }

Error clear_memory(void* at, int64_t n_bytes, Stream) {
  std::memset(at, 0, static_cast<size_t>(n_bytes));
  return nullptr;
}

}  // namespace bop2nd::cuda

// Which chip to pretend to be: 80 (XOR; lean: 89), 90 (AND), 100 (bytes; lean: 120), and its multiprocessors.
extern "C" __attribute__((visibility("default"))) void bop2nd_emulated_chip(int arch, int n_multiprocessors) {
  bop2nd::cuda::pretended = {arch * 10, n_multiprocessors};
}

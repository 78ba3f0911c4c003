// SPDX-License-Identifier: Apache-2.0
// Which kernel serves a binary product, with which tile, slices of k and scratch memory. Host only, no CUDA:
// the launcher, the tests and explain() ask the same function.
// The limits and their reasons are in dispatch_table.h.
#pragma once

#include <string>

#include "binary_matmul.h"
#include "binary_skinny.h"
#include "binary_terms.h"
#include "dispatch_table.h"

namespace bop2nd::cuda {

enum class Kernel : int { kSkinny, kSmallTile, kTallTile, kLargeTile };

// What a choice of kernel depends on. `arch` is the virtual architecture a kernel in use was compiled for, as
// __CUDA_ARCH__: kernels count (fragment.h) and share a multiprocessor (tile.h) by it.
struct Chip {
  int arch = 800, n_multiprocessors = 1;

  Math math() const { return math_of_arch(arch); }
  bool lean() const { return is_lean(arch); }
};

struct MatmulPlan {
  Kernel kernel = Kernel::kSmallTile;
  Math math = Math::kXorBits;
  bool lean = false;
  int vector_words = 1;
  int n_classes = 1;
  bool needs_terms = false;
  SplitK split;
  int64_t n_tiles = 0;
  // Scratch, in int32: [column terms | pixel counts | partial sums | arrivals]; the last two must be zero.
  int64_t column_term_words = 0, pixel_count_words = 0, partial_words = 0, arrival_words = 0;

  int64_t scratch_words() const { return zero_begin() + partial_words + arrival_words; }
  int64_t zero_begin() const { return column_term_words + pixel_count_words; }
  int64_t n_blocks() const { return n_tiles * split.n_slices; }

  // Operands that start in the middle of a vector (views) are read in smaller pieces.
  void fit_alignment(const void* x, const void* w) {
    uintptr_t both = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(w);
    while (vector_words > 1 && both % static_cast<uintptr_t>(4 * vector_words) != 0) vector_words /= 2;
    if (kernel == Kernel::kSkinny && vector_words == 2) vector_words = 1;
  }

  std::string describe() const {
    if (kernel == Kernel::kSkinny) {
      return "popcount kernel: up to 8 rows read the weights once, tensor cores would idle";
    }
    std::string text = math == Math::kXorBits ? "1-bit tensor cores, XOR.POPC"
                       : math == Math::kAndBits
                           ? "1-bit tensor cores, AND.POPC (XOR is not native on this chip)"
                           : "int8 tensor cores on decoded bits (1-bit is emulated on this chip)";
    text += kernel == Kernel::kLargeTile  ? ", 128x128 tiles"
            : kernel == Kernel::kTallTile ? ", 256x64 tiles"
                                          : ", 64x64 tiles";
    if (split.n_slices > 1) text += ", k split in " + std::to_string(split.n_slices);
    return text;
  }
};

struct TileSize {
  int rows = 0, columns = 0;
};

inline TileSize tile_size(Kernel kernel) {
  TileSize size;
  auto be = [&size](auto tile) { size.rows = decltype(tile)::kRows, size.columns = decltype(tile)::kCols; };
  if (kernel == Kernel::kSkinny) be(SkinnyTile{});
  if (kernel == Kernel::kSmallTile) be(SmallTile{});
  if (kernel == Kernel::kTallTile) be(TallTile{});
  if (kernel == Kernel::kLargeTile) be(LargeTile{});
  return size;
}

inline int64_t count_tiles(Kernel kernel, const ConvView& s) {
  TileSize size = tile_size(kernel);
  int64_t down = (s.n_rows() + size.rows - 1) / size.rows;
  int64_t across = (s.group_outputs + size.columns - 1) / size.columns;
  return down * across * s.groups;
}

inline MatmulPlan plan_matmul(const ConvView& s, const Chip& chip) {
  MatmulPlan plan;
  plan.vector_words = s.group_words % 4 == 0 ? 4 : s.group_words % 2 == 0 ? 2 : 1;
  bool linear = s.n_taps() == 1 && s.groups == 1 && s.vertical.size * s.horizontal.size == 1;
  if (linear && s.n_rows() <= limits::kSkinnyRows.value) {
    plan.kernel = Kernel::kSkinny;
    plan.vector_words = plan.vector_words == 4 ? 4 : 1;
    plan.n_tiles = count_tiles(plan.kernel, s);
    return plan;
  }
  plan.math = chip.math();
  plan.lean = chip.lean();
  int stages = s.n_stages(LargeTile::kStageWords);
  bool wide = s.group_outputs > limits::kNarrowOutputs.value;
  int64_t enough = static_cast<int64_t>(limits::kTilesPerMultiprocessor.value) * chip.n_multiprocessors;
  plan.kernel = wide ? Kernel::kLargeTile : Kernel::kTallTile;
  plan.n_tiles = count_tiles(plan.kernel, s);
  if (plan.n_tiles < enough) {
    plan.kernel = Kernel::kSmallTile;
    plan.n_tiles = count_tiles(plan.kernel, s);
  }
  plan.split.n_stages = stages;
  plan.split.n_slices = choose_slices(plan.n_tiles, stages, chip.n_multiprocessors,
                                      limits::kSplitBlocks.value, limits::kSplitStages.value);
  bool padded = s.vertical.top + s.vertical.bottom + s.horizontal.top + s.horizontal.bottom > 0;
  plan.n_classes = padded && s.padding_value != 1 ? s.n_classes() : 1;
  plan.needs_terms = plan.math != Math::kXorBits || plan.n_classes > 1;
  if (plan.needs_terms) plan.column_term_words = static_cast<int64_t>(plan.n_classes) * s.n_outputs();
  if (plan.math != Math::kXorBits) {
    plan.pixel_count_words =
        static_cast<int64_t>(s.n_images) * s.vertical.size * s.horizontal.size * s.groups;
  }
  if (plan.split.n_slices > 1) {
    TileSize size = tile_size(plan.kernel);
    plan.partial_words = plan.n_tiles * size.rows * size.columns;
    plan.arrival_words = plan.n_tiles;
  }
  return plan;
}

inline TermsProblem terms_of(const MatmulPlan& plan, const ConvView& shape, const uint32_t* x,
                             const uint32_t* w, int32_t* scratch) {
  TermsProblem terms;
  terms.x = x;
  terms.w = w;
  terms.shape = shape;
  terms.n_classes = plan.n_classes;
  terms.subtract_popcounts = plan.math != Math::kXorBits;
  terms.vectors = plan.vector_words == 4;
  terms.column_terms = scratch;
  terms.pixel_counts = scratch + plan.column_term_words;
  return terms;
}

inline MatmulProblem problem_of(const MatmulPlan& plan, const ConvView& shape, const uint32_t* x,
                                const uint32_t* w, int32_t* scratch, const Epilogue& epilogue) {
  MatmulProblem p;
  p.x = x;
  p.w = w;
  p.shape = shape;
  p.epilogue = epilogue;
  p.scatter_bits = shape.groups > 1 && shape.group_outputs % kWordBits != 0;
  p.n_classes = plan.n_classes;
  p.split = plan.split;
  if (plan.needs_terms) p.column_terms = scratch;
  if (plan.pixel_count_words) p.pixel_counts = scratch + plan.column_term_words;
  if (plan.split.n_slices > 1) {
    p.partial = scratch + plan.zero_begin();
    p.arrivals = reinterpret_cast<uint32_t*>(scratch + plan.zero_begin() + plan.partial_words);
  }
  return p;
}

}  // namespace bop2nd::cuda

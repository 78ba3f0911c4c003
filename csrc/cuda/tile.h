// SPDX-License-Identifier: Apache-2.0
// How a matrix product is cut: blocks, stages in shared memory, warps, slices of k; and where a 16-byte chunk
// lies in shared memory so that neither the copies in nor ldmatrix meet bank conflicts.
// Limits: no CUDA header, compiles for host and device; unit-tested in tests/cpp/cuda_index_test.cpp.
#pragma once

#include "fragment.h"

namespace bop2nd::cuda {

// Unsigned division by a number known at launch: a multiplication and a shift. Exact for n < 2^31.
struct FastDivide {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    while (shift < 31 && (1u << shift) < d) ++shift;  // 2^shift >= d
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  BOP2ND_HD uint32_t quotient(uint32_t n) const {
    uint32_t high = static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32);
    return (high + n) >> shift;
  }
  BOP2ND_HD uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

// A block computes kRows pixels x kCols outputs; each of its warps kWarpRows x kWarpCols of them. The result
// is staged in shared memory in kParts parts, one after the other. Lean: the same tile where a multiprocessor
// has little shared memory (below).
template <int rows, int cols, int warps_down, int warps_across, int stages, int parts, int lean_stages,
          int lean_parts>
struct Tile {
  using Lean = Tile<rows, cols, warps_down, warps_across, lean_stages, lean_parts, lean_stages, lean_parts>;
  static constexpr int kRows = rows, kCols = cols, kStages = stages;
  static constexpr int kWarpsAcross = warps_across;
  static constexpr int kThreads = warps_down * warps_across * 32;
  static constexpr int kWarpRows = rows / warps_down, kWarpCols = cols / warps_across;
  static constexpr int kDown = kWarpRows / FragmentBits::kM, kAcross = kWarpCols / FragmentBits::kN;

  static constexpr int kStageWords = 16;  // 512 bits of k per stage: two steps of 256
  static constexpr int kSteps = kStageWords / FragmentBits::kWords;
  static constexpr int kChunksPerRow = kStageWords / 4;
  static constexpr int kRowStep = kThreads / kChunksPerRow;  // rows one pass of all threads copies
  static constexpr int kRowCopies = rows / kRowStep, kColCopies = cols / kRowStep;
  static constexpr int kStageBytes = (rows + cols) * kStageWords * 4;
  static constexpr int kRowTerms = (rows + kThreads - 1) / kThreads;  // of a thread
  static constexpr int kParts = parts, kPartRows = rows / parts;
  static constexpr int kPartBytes = kPartRows * cols * 4;
  // The epilogue reuses the stages; per pixel also its term and its border class, then a flag.
  static constexpr int kResultBytes = kPartBytes + kPartRows * 8 + 16;
  static constexpr int kSharedBytes =
      stages * kStageBytes > kResultBytes ? stages * kStageBytes : kResultBytes;

  static_assert(stages >= 2 && kPartRows % kWarpRows == 0, "a warp's rows are in one part");
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0 && cols % 32 == 0);
  static_assert(rows % kRowStep == 0 && cols % kRowStep == 0);
};

using LargeTile = Tile<128, 128, 2, 2, 4, 1, 3, 2>;  // 64 x 64 per warp: 128 accumulators a thread
using TallTile = Tile<256, 64, 4, 1, 3, 1, 2, 2>;    // 64 x 64 per warp, for few outputs
using SmallTile = Tile<64, 64, 2, 2, 4, 1, 3, 1>;    // 32 x 32 per warp

// Of these, so many blocks shall share a multiprocessor: one copies and finishes while the other multiplies.
// `arch` as __CUDA_ARCH__; a block costs 1 KiB more than it asks for. Shared memory of a multiprocessor: 164
// KiB on 8.0 and 8.7, 228 KiB on 9.0 to 11.0, 100 KiB on 8.6, 8.9 and 12.x (CUDA programming guide).
BOP2ND_HD constexpr bool is_lean(int arch) {
  return arch >= 1200 || (arch >= 810 && arch < 900 && arch != 870);
}
template <class Tile>
constexpr bool fits(int blocks, int kib_of_multiprocessor) {
  return blocks * (Tile::kSharedBytes + 1024) <= kib_of_multiprocessor * 1024;
}
static_assert(fits<LargeTile>(2, 164) && fits<TallTile>(2, 164) && fits<SmallTile>(4, 164));
static_assert(fits<LargeTile::Lean>(2, 100) && fits<TallTile::Lean>(2, 100) && fits<SmallTile::Lean>(4, 100));
static_assert(fits<LargeTile>(1, 99) && fits<TallTile>(1, 99), "PTX of 9.0 on a chip with 100 KiB");

// Byte offset of 16-byte chunk `chunk` (0..3) of row `row` in a 64-byte-row operand. Eight rows x one chunk
// (ldmatrix) and two rows x four chunks (copies) both fall into eight different 16-byte bank groups.
BOP2ND_HD constexpr int swizzle(int row, int chunk) { return (row * 4 + (chunk ^ ((row >> 1) & 3))) * 16; }

// What that does to neighbours, so that a thread computes one address for all its ldmatrix: the same chunk of
// a later k256 step (two chunks each), and the same chunk `rows` (a multiple of eight) further down.
BOP2ND_HD constexpr int chunk_of_step(int offset_of_first, int step) { return offset_of_first ^ (step * 32); }
BOP2ND_HD constexpr int rows_further(int rows) { return rows * 64; }

// Word index of (row, col) in the staged int32 result of `cols` columns: rows that a quarter warp writes
// together are turned by 8 words each.
BOP2ND_HD constexpr int result_index(int row, int col, int cols) {
  return row * cols + (col ^ ((row & 3) * 8));
}

// Stages of k are dealt to `n_slices` blocks as evenly as possible; every slice has at least one stage.
struct SplitK {
  int n_stages = 1, n_slices = 1;

  BOP2ND_HD int begin(int slice) const {
    return static_cast<int>(static_cast<int64_t>(n_stages) * slice / n_slices);
  }
  BOP2ND_HD int end(int slice) const { return begin(slice + 1); }
};

// As many slices as give every multiprocessor `blocks` of them, none shorter than `min_stages`.
inline int choose_slices(int64_t n_tiles, int n_stages, int n_multiprocessors, int blocks, int min_stages) {
  if (n_tiles >= n_multiprocessors) return 1;
  int64_t wanted = static_cast<int64_t>(blocks) * n_multiprocessors / n_tiles;
  int64_t possible = n_stages / min_stages;
  int64_t slices = wanted < possible ? wanted : possible;
  return slices < 1 ? 1 : static_cast<int>(slices);
}

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// Binary matrix product for few rows (a batch of 1 to 8) by plain popcounts: up to about 4 rows bound by
// reading the weights once (H100; at 8 rows 16 popcounts a clock and multiprocessor keep up with 1.85 TB/s).
// counts[row, col] = popc(x[row] ^ w[col]); a block does 8 rows x 32 outputs, each of its 8 warps 4 outputs,
// a lane every 32nd vector of 16 bytes of k. Epilogue as in epilogue.h.
//
// Cost: n * k / 8 bytes of weights; rows * n * k / 32 popcounts (16 a clock and multiprocessor on sm_90).
// Limits: linear layers; above 8 rows every further 8 read the weights again.
#pragma once

#include "binary_matmul.h"

namespace bop2nd::cuda {

struct SkinnyTile {
  static constexpr int kRows = 8, kCols = 32, kThreads = 256, kPerWarp = kCols / (kThreads / 32);
  static constexpr int kSharedBytes = kRows * kCols * 4 + kRows * 8;
};

struct SkinnyThread {
  int32_t count[SkinnyTile::kPerWarp][SkinnyTile::kRows];
};

// kVector = 4: rows of both operands are multiples of 4 words, aligned to 16 bytes; else 1.
template <int kVector, class Block>
BOP2ND_HD void skinny_block(Block& block, const MatmulProblem& p, int tile) {
  using Tile = SkinnyTile;
  const ConvView& s = p.shape;
  int across = (s.group_outputs + Tile::kCols - 1) / Tile::kCols;
  int row0 = tile / across * Tile::kRows, col0 = tile % across * Tile::kCols;
  int rows = s.n_rows() - row0 < Tile::kRows ? s.n_rows() - row0 : Tile::kRows;
  int cols = s.group_outputs - col0 < Tile::kCols ? s.group_outputs - col0 : Tile::kCols;
  typename Block::template Threads<SkinnyThread, Tile::kThreads> threads;
  int32_t* counts = block.template shared<int32_t>(0);
  int32_t* row_terms = counts + Tile::kRows * Tile::kCols;

  block.each(threads, [&](int thread, SkinnyThread& t) {
#pragma unroll
    for (int j = 0; j < Tile::kPerWarp; ++j)
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) t.count[j][r] = 0;
    if (thread < Tile::kRows) row_terms[thread] = row_terms[Tile::kRows + thread] = 0;
    int first = col0 + thread / 32 * Tile::kPerWarp;
    for (int k = thread % 32 * kVector; k < s.k_words(); k += 32 * kVector) {
      uint32_t w[Tile::kPerWarp][kVector];
#pragma unroll
      for (int j = 0; j < Tile::kPerWarp; ++j) {
        int col = first + j < s.group_outputs ? first + j : s.group_outputs - 1;
        block.template load_words<kVector>(w[j], p.w + static_cast<int64_t>(col) * s.k_words() + k);
      }
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        if (r < rows) {
          uint32_t x[kVector];
          block.template load_words<kVector>(x, p.x + static_cast<int64_t>(row0 + r) * s.k_words() + k);
#pragma unroll
          for (int j = 0; j < Tile::kPerWarp; ++j)
#pragma unroll
            for (int v = 0; v < kVector; ++v) t.count[j][r] += block.popcount(x[v] ^ w[j][v]);
        }
      }
    }
  });
#pragma unroll
  for (int j = 0; j < Tile::kPerWarp; ++j)
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      if (r < rows)
        block.template sum_lanes<32>(threads, [&](SkinnyThread& t) -> int32_t& { return t.count[j][r]; });
    }
  block.each(threads, [&](int thread, SkinnyThread& t) {
    if (thread % 32 != 0) return;
#pragma unroll
    for (int j = 0; j < Tile::kPerWarp; ++j)
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        counts[result_index(r, thread / 32 * Tile::kPerWarp + j, Tile::kCols)] = t.count[j][r];
      }
  });
  block.sync();
  StagedResult result{};
  result.counts = counts, result.row_terms = row_terms, result.classes = row_terms + Tile::kRows;
  result.first_row = row0, result.n_rows = rows;
  result.first_output = col0, result.n_cols = cols;
  result.n_outputs = s.n_outputs(), result.k_elements = s.k_elements();
  result.scale = accumulator_scale(Math::kXorBits);
  if (p.epilogue.values)
    emit_values<Tile::kRows, Tile::kCols, Tile::kThreads>(block, threads, result, p.epilogue);
  if (p.epilogue.signs) emit_bits<Tile::kRows, Tile::kCols, Tile::kThreads>(block, result, p.epilogue);
}

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// Binary matrix product and convolution on the tensor cores: the work of one block, written once for the GPU
// and for the emulated block of tests/cpp (see device_block.cuh for the vocabulary).
//
//   counts[row, col] = sum over k words of popc(x[row, k] op w[col, k]),   op = XOR or AND (fragment.h)
//
// Rows are output pixels, read where they lie in the packed image (conv_view.h); columns are outputs of one
// group. Stages of 512 bits of k travel through kStages buffers of shared memory by asynchronous copies of
// kVector words; ldmatrix feeds m16n8k256 instructions; slices of k (tile.h: SplitK) are added up in global
// memory and the last block to arrive writes the result.
//
// Cost per block and stage: (rows + cols) * 64 bytes copied, rows * cols * 512 multiply-accumulates. A warp
// of the large tile spends, read from sm_90's machine code, 216 instructions on the stage's 64 BMMA: 16
// ldmatrix.x4, 8 copies, the rest addresses (check.py holds the loop to its budget).
//
// Predicted, not measured, for 128x128 tiles on an H200, if a BMMA takes 8 clocks of a multiprocessor's
// quarter as on sm_80 (sm_90's rate is not published; mma_peak.cu measures it). In the 512 clocks of a stage:
//   instruction slots 42 %; shared memory 48 KiB of 64 KiB, 75 %, no bank conflicts (cuda_index_test.cpp);
//   second-level cache 16 KiB, 32 bytes a clock and multiprocessor - its bandwidth, somewhere at 24 to 30 of
//   them, is the limit, and fp32 results of 8192^3 add a quarter to what it moves.
// So 60 to 75 % of the peak with fp32 results, more with bits. If less is measured, 256x128 tiles (24 bytes a
// clock) or multicast copies are the first things to try.
//
// Limits: 2^31 - 1 rows, outputs and words; kVector divides the words of a group.
#pragma once

#include "epilogue.h"

namespace bop2nd::cuda {

struct MatmulProblem {
  const uint32_t* x = nullptr;  // [images, height, width, groups * group_words]
  const uint32_t* w = nullptr;  // [groups * group_outputs, taps * group_words]
  ConvView shape;
  const int32_t* column_terms = nullptr;  // [n_classes, outputs], see binary_terms.h; null: k_elements
  const int32_t* pixel_counts = nullptr;  // [input pixels, groups], AND only
  int n_classes = 1;                      // 1: border classes do not matter
  SplitK split;
  int32_t* partial = nullptr;    // [tiles, rows * cols], zeroed; with several slices
  uint32_t* arrivals = nullptr;  // [tiles], zeroed
  Epilogue epilogue;
  bool scatter_bits = false;  // a group's outputs do not start on a word: signs are zeroed beforehand

  template <class Tile>
  BOP2ND_HD int row_tiles() const {
    return (shape.n_rows() + Tile::kRows - 1) / Tile::kRows;
  }
  template <class Tile>
  BOP2ND_HD int column_tiles() const {  // per group
    return (shape.group_outputs + Tile::kCols - 1) / Tile::kCols;
  }
};

template <class Tile>
struct Fragments {
  uint32_t a[Tile::kDown][4];
  uint32_t b[Tile::kAcross][2];
};

template <class Tile>
struct MatmulThread {
  int32_t x_base[Tile::kRowCopies];  // word of tap (0, 0); may lie in the padding
  int32_t y[Tile::kRowCopies], x[Tile::kRowCopies];
  int32_t w_base[Tile::kColCopies];                              // negative where there is no such output
  int32_t term[Tile::kRowTerms], border_class[Tile::kRowTerms];  // of rows thread, thread + kThreads, ...
  int32_t copy_target;  // of this thread's first chunk, within a stage
  int32_t count[Tile::kDown][Tile::kAcross][4];
};

template <class Tile, Math math, int kVector, class Block>
struct MatmulBlock {
  using Thread = MatmulThread<Tile>;
  using Threads = typename Block::template Threads<Thread, Tile::kThreads>;

  Block& block;
  const MatmulProblem& p;
  Threads threads;
  int tile, slice, row0, group, col0;

  BOP2ND_HD MatmulBlock(Block& block_, const MatmulProblem& problem, int tile_, int slice_)
      : block(block_), p(problem), tile(tile_), slice(slice_) {
    int across = p.template column_tiles<Tile>();
    int per_row = across * p.shape.groups;
    row0 = tile / per_row * Tile::kRows;
    group = tile % per_row / across;
    col0 = tile % across * Tile::kCols;
  }

  BOP2ND_HD int32_t* shared_row_terms() { return block.template shared<int32_t>(Tile::kPartBytes); }
  BOP2ND_HD int32_t* shared_classes() { return shared_row_terms() + Tile::kPartRows; }

  BOP2ND_HD void locate() {
    const ConvView& s = p.shape;
    block.each(threads, [&](int thread, Thread& t) {
#pragma unroll
      for (int i = 0; i < Tile::kRowCopies; ++i) {
        int row = row0 + thread / Tile::kChunksPerRow + i * Tile::kRowStep;
        bool exists = row < s.n_rows();
        Pixel pixel = s.pixel(exists ? row : 0);
        t.y[i] = exists ? s.vertical.position(pixel.y, 0) : -kOutside;
        t.x[i] = s.horizontal.position(pixel.x, 0);
        int at =
            (pixel.image * s.vertical.size + s.vertical.position(pixel.y, 0)) * s.horizontal.size + t.x[i];
        t.x_base[i] = at * s.pixel_words() + group * s.group_words;
      }
#pragma unroll
      for (int i = 0; i < Tile::kColCopies; ++i) {
        int col = col0 + thread / Tile::kChunksPerRow + i * Tile::kRowStep;
        t.w_base[i] = col < s.group_outputs ? (group * s.group_outputs + col) * s.k_words() : -kOutside;
      }
#pragma unroll
      for (int i = 0; i < Tile::kDown; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kAcross; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) t.count[i][j][r] = 0;
      t.copy_target = swizzle(thread / Tile::kChunksPerRow, thread % Tile::kChunksPerRow);
#pragma unroll
      for (int i = 0; i < Tile::kRowTerms; ++i) row_term(t, i, row0 + thread + i * Tile::kThreads);
    });
  }

  // Of a row: -2 popc(x) over the taps inside the image (AND only), and the border class. Worked out before
  // the accumulators take their registers.
  BOP2ND_HD void row_term(Thread& t, int i, int row) {
    const ConvView& s = p.shape;
    int term = 0, border_class = 0;
    if (row < s.n_rows()) {
      Pixel pixel = s.pixel(row);
      if (p.n_classes > 1) border_class = s.class_of(pixel);
      if (math != Math::kXorBits) {
        for (int ky = 0; ky < s.vertical.kernel; ++ky)
          for (int kx = 0; kx < s.horizontal.kernel; ++kx) {
            int at = s.input_pixel(pixel, ky, kx);
            if (at >= 0) term -= 2 * p.pixel_counts[static_cast<int64_t>(at) * s.groups + group];
          }
      }
    }
    t.term[i] = term;
    t.border_class[i] = border_class;
  }

  // Where a source does not exist (padding, rows past the end) nothing is read and zeros are written, so its
  // address does not matter. No branches: conditions are combined with &.
  BOP2ND_HD void copy_stage(int stage) {
    const ConvView& s = p.shape;
    constexpr int kPassBytes = Tile::kRowStep * Tile::kStageWords * 4;  // rows of one pass of all threads
    static_assert(Tile::kRowStep % 8 == 0, "the swizzle repeats every eight rows");
    block.each(threads, [&](int thread, Thread& t) {
      int target = stage % Tile::kStages * Tile::kStageBytes + t.copy_target;
#pragma unroll
      for (int part = 0; part < 4; part += kVector) {
        int k = stage * Tile::kStageWords + thread % Tile::kChunksPerRow * 4 + part;
        bool in_k = k < s.k_words();
        Tap tap = s.tap(k);
        int dy = tap.ky * s.vertical.dilation, dx = tap.kx * s.horizontal.dilation;
        int offset = (dy * s.horizontal.size + dx) * s.pixel_words() + tap.word;
#pragma unroll
        for (int i = 0; i < Tile::kRowCopies; ++i) {
          bool inside = in_k & s.vertical.inside(t.y[i] + dy) & s.horizontal.inside(t.x[i] + dx);
          block.template copy_async<kVector * 4>(target + i * kPassBytes + part * 4, p.x,
                                                 t.x_base[i] + offset, inside);
        }
#pragma unroll
        for (int i = 0; i < Tile::kColCopies; ++i) {
          bool exists = in_k & (t.w_base[i] >= 0);
          block.template copy_async<kVector * 4>(target + Tile::kRows * 64 + i * kPassBytes + part * 4, p.w,
                                                 t.w_base[i] + k, exists);
        }
      }
    });
  }

  // One k256 step: fragments from shared memory, then kDown x kAcross instructions a warp.
  BOP2ND_HD void multiply(int stage, int step) {
    int buffer = stage % Tile::kStages * Tile::kStageBytes;
    typename Block::template Threads<Fragments<Tile>, Tile::kThreads> bits;
#pragma unroll
    for (int i = 0; i < Tile::kDown; ++i) {
      block.load_matrix(
          bits,
          [&](int thread) {
            Coordinate at = LoadMatrix::a_row(thread % 32);
            int row = thread / 32 / Tile::kWarpsAcross * Tile::kWarpRows + at.row;
            return buffer + chunk_of_step(swizzle(row, at.col), step) + rows_further(i * 16);
          },
          [&](Fragments<Tile>& f) { return f.a[i]; });
    }
#pragma unroll
    for (int j = 0; j < Tile::kAcross; j += 2) {
      block.load_matrix(
          bits,
          [&](int thread) {
            Coordinate at = LoadMatrix::b_row(thread % 32);
            int col = thread / 32 % Tile::kWarpsAcross * Tile::kWarpCols + at.row;
            return buffer + chunk_of_step(swizzle(Tile::kRows + col, at.col), step) + rows_further(j * 8);
          },
          [&](Fragments<Tile>& f) { return f.b[j]; });
    }
    if constexpr (math != Math::kAndBytes) {
      block.template multiply<math>(threads, bits);
    } else {
      typename Block::template Threads<Fragments<Tile>, Tile::kThreads> bytes;
#pragma unroll 1
      for (int shift = 0; shift < kByteSteps; ++shift) {
        block.each(bytes, bits, [&](int, Fragments<Tile>& byte, Fragments<Tile>& bit) {
#pragma unroll
          for (int i = 0; i < Tile::kDown; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) byte.a[i][r] = decode_bytes(bit.a[i][r], shift);
#pragma unroll
          for (int j = 0; j < Tile::kAcross; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) byte.b[j][r] = decode_bytes(bit.b[j][r], shift);
        });
        block.template multiply<math>(threads, bytes);
      }
    }
  }

  BOP2ND_HD void accumulate() {
    int begin = p.split.begin(slice), end = p.split.end(slice);
    int steps = (p.shape.k_words() + FragmentBits::kWords - 1) / FragmentBits::kWords;
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (begin + i < end) copy_stage(begin + i);
      block.commit_copies();
    }
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      block.template wait_copies<Tile::kStages - 2>();  // this stage has arrived, for this thread
      block.sync();                                     // for all; and all have read the stage before
      if (stage + Tile::kStages - 1 < end) copy_stage(stage + Tile::kStages - 1);
      block.commit_copies();
      if ((stage + 1) * Tile::kSteps <= steps) {
#pragma unroll
        for (int step = 0; step < Tile::kSteps; ++step) multiply(stage, step);
      } else {  // the last stage may be half empty
#pragma unroll 1
        for (int step = 0; stage * Tile::kSteps + step < steps; ++step) multiply(stage, step);
      }
    }
    block.template wait_copies<0>();
    block.sync();
  }

  // A part's counts into shared memory, from registers; with several slices those of the whole tile, added to
  // global memory. One loop for both: two cost registers that are not there.
  BOP2ND_HD void put(int part, int32_t* sums) {
    int32_t* counts = block.template shared<int32_t>(0);
    block.each(threads, [&](int thread, Thread& t) {
      int warp = thread / 32;
      int down = warp / Tile::kWarpsAcross * Tile::kWarpRows,
          across = warp % Tile::kWarpsAcross * Tile::kWarpCols;
      if (!sums && down / Tile::kPartRows != part) return;
      if (!sums) down -= part * Tile::kPartRows;
#pragma unroll
      for (int i = 0; i < Tile::kDown; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kAcross; ++j)
#pragma unroll
          for (int r = 0; r < 4; r += 2) {  // registers r and r + 1 hold neighbours of a row
            Coordinate at = FragmentBits::c(thread % 32, r);
            int index = result_index(down + i * 16 + at.row, across + j * 8 + at.col, Tile::kCols);
            if (sums) {
              block.atomic_add(sums + index, t.count[i][j][r]);
              block.atomic_add(sums + index + 1, t.count[i][j][r + 1]);
            } else {
              *reinterpret_cast<Word2*>(counts + index) = {
                  {static_cast<uint32_t>(t.count[i][j][r]), static_cast<uint32_t>(t.count[i][j][r + 1])}};
            }
          }
    });
  }

  // After all slices but this one have added theirs. False: another block will write this tile.
  BOP2ND_HD bool is_last() {
    int32_t* last = shared_classes() + Tile::kPartRows;
    block.fence();
    block.sync();
    block.each(threads, [&](int thread, Thread&) {
      if (thread == 0)
        *last = block.atomic_add(p.arrivals + tile, 1u) + 1 == static_cast<uint32_t>(p.split.n_slices);
    });
    block.sync();
    if (!*last) return false;
    block.fence();
    return true;
  }

  // The rest of a part: its rows' terms, and its counts where all slices' sums hold them.
  BOP2ND_HD void stage(int part, const int32_t* sums) {
    int32_t* counts = block.template shared<int32_t>(0);
    block.each(threads, [&](int thread, Thread& t) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTerms; ++i) {
        int row = thread + i * Tile::kThreads - part * Tile::kPartRows;
        if (row < 0 || row >= Tile::kPartRows) continue;
        shared_row_terms()[row] = t.term[i];
        shared_classes()[row] = t.border_class[i];
      }
      if (!sums) return;
      for (int i = thread; i < Tile::kPartRows * Tile::kCols; i += Tile::kThreads)
        counts[i] = block.load_shared_by_blocks(sums + part * Tile::kPartRows * Tile::kCols + i);
    });
  }

  BOP2ND_HD void emit(int part, int rows) {
    const ConvView& s = p.shape;
    int cols = s.group_outputs - col0;
    StagedResult result{};
    result.counts = block.template shared<int32_t>(0);
    result.row_terms = shared_row_terms(), result.classes = shared_classes();
    result.first_row = row0 + part * Tile::kPartRows;
    result.n_rows = rows < Tile::kPartRows ? rows : Tile::kPartRows;
    result.first_output = group * s.group_outputs + col0;
    result.n_cols = cols < Tile::kCols ? cols : Tile::kCols;
    result.n_outputs = s.n_outputs(), result.k_elements = s.k_elements();
    result.scale = accumulator_scale(math);
    result.column_terms = p.column_terms, result.scatter_bits = p.scatter_bits;
    if (p.epilogue.values)
      emit_values<Tile::kPartRows, Tile::kCols, Tile::kThreads>(block, threads, result, p.epilogue);
    if (p.epilogue.signs) emit_bits<Tile::kPartRows, Tile::kCols, Tile::kThreads>(block, result, p.epilogue);
  }

  BOP2ND_HD void run() {
    locate();
    accumulate();
    bool split = p.split.n_slices > 1;
    int32_t* sums = split ? p.partial + static_cast<int64_t>(tile) * Tile::kRows * Tile::kCols : nullptr;
    int rows = p.shape.n_rows() - row0;
#pragma unroll 1
    for (int part = 0; part < Tile::kParts && rows > part * Tile::kPartRows; ++part) {
      if (part > 0) block.sync();  // the part before has been read
      if (part == 0 || !split) put(part, sums);
      if (part == 0 && split && !is_last()) return;
      stage(part, sums);
      block.sync();
      emit(part, rows - part * Tile::kPartRows);
    }
  }
};

}  // namespace bop2nd::cuda

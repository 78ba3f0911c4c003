// SPDX-License-Identifier: Apache-2.0
// From counts to results. A block has staged its int32 counts in shared memory (tile.h: result_index); here
// they become dots and leave as real values, as bits, or as both in one pass:
//
//   dot = row_term[row] + column_term[class(row)][col] + scale_of_math * count
//
// and then the epilogue's formula (core/epilogue.h).
//
// Cost: 4 bytes of shared memory read per element and kind of output, 16 at a time for values; one global
// sector per 8 fp32 values.
#pragma once

#include "../core/epilogue.h"
#include "conv_view.h"
#include "value.h"

namespace bop2nd::cuda {

// A rectangle of the result: what a block has staged, and where it lies.
struct StagedResult {
  const int32_t* counts;     // shared; indexed by result_index(row, col, kCols)
  const int32_t* row_terms;  // shared, [rows]
  const int32_t* classes;    // shared, [rows]
  int first_row, n_rows;     // valid rows
  int first_output, n_cols;  // valid columns
  int n_outputs;             // of all groups: row pitch of `values` and of `column_terms`
  int scale;
  int k_elements;
  const int32_t* column_terms;  // global, [classes][n_outputs], or null: k_elements everywhere
  bool scatter_bits;            // a group's outputs do not start on a word: `signs` are zero, bits are added
};

// The values of n neighbouring outputs, of which `left` exist; `index` the place of the first in `values`.
template <int n>
BOP2ND_HD void values_of(const Epilogue& e, const int32_t (&dots)[n], int output, int64_t index, int left,
                         float (&x)[n]) {
  float residual[n] = {};
  if (e.residual) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      residual[i] = load_value(e.residual, e.dtype, index + (i < left ? i : left - 1));
  }
  finish(e, dots, output, left, residual, x);
}

struct alignas(16) Dots4 {
  int32_t v[4];
};

// The dots of four neighbours of a row, of which `left` exist; `whole`: all, and rows are aligned.
template <int kCols>
BOP2ND_HD Dots4 dots_of(const StagedResult& r, int row, int col, int left, bool whole) {
  Dots4 dots = *reinterpret_cast<const Dots4*>(r.counts + result_index(row, col, kCols));
  Dots4 base{{r.k_elements, r.k_elements, r.k_elements, r.k_elements}};
  if (r.column_terms) {
    const int32_t* terms =
        r.column_terms + static_cast<int64_t>(r.classes[row]) * r.n_outputs + r.first_output + col;
    if (whole) {
      base = *reinterpret_cast<const Dots4*>(terms);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) base.v[i] = terms[i < left ? i : left - 1];
    }
  }
  int row_term = r.row_terms[row];
#pragma unroll
  for (int i = 0; i < 4; ++i) dots.v[i] = base.v[i] + row_term + r.scale * dots.v[i];
  return dots;
}

// Four columns to a thread, so 16-byte stores of fp32 where the rows allow it.
template <int kRows, int kCols, int kThreads, class Block, class Threads>
BOP2ND_HD void emit_values(Block& block, Threads& threads, const StagedResult& r, const Epilogue& e) {
  constexpr int kQuads = kCols / 4, kRowStep = kThreads / kQuads;
  bool aligned = r.n_outputs % 4 == 0 && r.first_output % 4 == 0;
  block.each(threads, [&](int thread, auto&) {
    int col = thread % kQuads * 4, left = r.n_cols - col < 4 ? r.n_cols - col : 4;
    if (left <= 0) return;
    bool whole = aligned && left == 4;
    for (int row = thread / kQuads; row < r.n_rows; row += kRowStep) {
      int64_t index = static_cast<int64_t>(r.first_row + row) * r.n_outputs + r.first_output + col;
      Dots4 dots = dots_of<kCols>(r, row, col, left, whole);
      Float4 x;
      values_of(e, dots.v, r.first_output + col, index, left, x.v);
      if (whole) {
        store_value4(e.values, e.dtype, index, x);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < left) store_value(e.values, e.dtype, index + i, x.v[i]);
        }
      }
    }
  });
}

struct BitsThread {
  int32_t limit, base, border_class;  // of this thread's column; `base` holds for the border class
  uint32_t word;
};

// A warp does 32 columns, one to a lane, and a run of neighbouring rows: a ballot makes the word of a row,
// lane i keeps that of row i and stores it. Border classes change rarely along the rows, so their terms stay
// in a register. kThreshold: bits by thresholds; else by the sign of the value.
template <bool kThreshold, int kRows, int kCols, int kThreads, class Block>
BOP2ND_HD void emit_bits_by(Block& block, const StagedResult& r, const Epilogue& e) {
  constexpr int kGroups = kCols / 32, kWarps = kThreads / 32, kRun = kRows / (kWarps / kGroups);
  constexpr int kBatch = kRun < 32 ? kRun : 32;
  static_assert(kWarps % kGroups == 0 && kRun % kBatch == 0);
  typename Block::template Threads<BitsThread, kThreads> threads;
  auto row_of = [](int thread, int i) { return thread / 32 / kGroups * kRun + i; };
  auto col_of = [](int thread) { return thread / 32 % kGroups * 32 + thread % 32; };
  block.each(threads, [&](int thread, BitsThread& t) {
    bool exists = kThreshold && col_of(thread) < r.n_cols;
    t.limit = exists ? e.threshold[r.first_output + col_of(thread)] : INT32_MIN;
    t.base = r.k_elements;
    t.border_class = r.column_terms ? -1 : 0;
    t.word = 0;
  });
  for (int batch = 0; batch < kRun; batch += kBatch) {
#pragma unroll 4
    for (int i = 0; i < kBatch; ++i) {
      block.ballot(
          threads,
          [&](int thread, BitsThread& t) {
            int row = row_of(thread, batch + i), col = col_of(thread), output = r.first_output + col;
            if (r.column_terms && r.classes[row] != t.border_class) {
              t.border_class = r.classes[row];
              if (col < r.n_cols)
                t.base = r.column_terms[static_cast<int64_t>(t.border_class) * r.n_outputs + output];
            }
            int dot = t.base + r.row_terms[row] + r.scale * r.counts[result_index(row, col, kCols)];
            if (kThreshold) return dot < t.limit;
            if (row >= r.n_rows || col >= r.n_cols) return false;
            int64_t index = static_cast<int64_t>(r.first_row + row) * r.n_outputs + output;
            const int32_t dots[1] = {dot};
            float value[1];
            values_of(e, dots, output, index, 1, value);
            return is_negative(e, dot, value[0], output);
          },
          [&](int thread, BitsThread& t, uint32_t word) {
            if (thread % 32 == i) t.word = word;
          });
    }
    block.each(threads, [&](int thread, BitsThread& t) {
      int lane = thread % 32, row = row_of(thread, batch + lane), col = col_of(thread) - lane;
      if (lane >= kBatch || row >= r.n_rows || col >= r.n_cols) return;
      int output = r.first_output + col, bit = output % 32;
      int row_words = (r.n_outputs + kWordBits - 1) / kWordBits;
      uint32_t* target = e.signs + static_cast<int64_t>(r.first_row + row) * row_words + output / 32;
      if (!r.scatter_bits) {
        *target = t.word;
        return;
      }
      if (t.word << bit) block.atomic_or(target, t.word << bit);
      if (bit && t.word >> (32 - bit)) block.atomic_or(target + 1, t.word >> (32 - bit));
    });
  }
}

template <int kRows, int kCols, int kThreads, class Block>
BOP2ND_HD void emit_bits(Block& block, const StagedResult& r, const Epilogue& e) {
  if (e.threshold) {
    emit_bits_by<true, kRows, kCols, kThreads>(block, r, e);
  } else {
    emit_bits_by<false, kRows, kCols, kThreads>(block, r, e);
  }
}

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// From counts to results. A block has staged its int32 counts in shared memory (tile.h: result_index); here
// they become dots and leave as real values, as bits, or as both in one pass:
//
//   dot   = row_term[row] + column_term[class(row)][col] + scale_of_math * count
//   value = dot (* scale[col]) (+ shift[col]) (+ residual[row, col])      each operation rounded on its own
//   bit   = dot < threshold[col], or value < 0 without thresholds
//
// Cost: 4 bytes of shared memory read per element and kind of output; one global sector per 8 fp32 values.
#pragma once

#include "conv_shape.h"
#include "value.h"

namespace bop2nd::cuda {

struct Epilogue {
  void* values = nullptr;  // [rows, outputs] row-major
  Value value_type = Value::kNone;
  uint32_t* bits = nullptr;  // [rows, bit_row_words]; zeroed beforehand if `scatter_bits`
  int bit_row_words = 0;
  bool scatter_bits = false;           // a group's outputs do not start on a word
  const int32_t* threshold = nullptr;  // [outputs]
  const float* scale = nullptr;        // [outputs]
  const float* shift = nullptr;        // [outputs]
  const void* residual = nullptr;      // like values
};

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
};

template <int kCols>
BOP2ND_HD int dot_of(const StagedResult& r, int row, int col) {
  int output = r.first_output + col;
  int base = r.column_terms ? r.column_terms[static_cast<int64_t>(r.classes[row]) * r.n_outputs + output]
                            : r.k_elements;
  return base + r.row_terms[row] + r.scale * r.counts[result_index(row, col, kCols)];
}

BOP2ND_HD float value_of_dot(const Epilogue& e, int dot, int output, int64_t index) {
  float x = static_cast<float>(dot);
  if (e.scale) x = x * e.scale[output];
  if (e.shift) x = x + e.shift[output];
  if (e.residual) x = x + load_value(e.residual, e.value_type, index);
  return x;
}

// Four columns to a thread, so 16-byte stores of fp32 where the rows allow it.
template <int kRows, int kCols, int kThreads, class Block, class Threads>
BOP2ND_HD void emit_values(Block& block, Threads& threads, const StagedResult& r, const Epilogue& e) {
  constexpr int kQuads = kCols / 4, kRowStep = kThreads / kQuads;
  bool aligned = r.n_outputs % 4 == 0 && r.first_output % 4 == 0;
  block.each(threads, [&](int thread, auto&) {
    int col = thread % kQuads * 4;
    for (int row = thread / kQuads; row < r.n_rows; row += kRowStep) {
      int64_t index = static_cast<int64_t>(r.first_row + row) * r.n_outputs + r.first_output + col;
      int left = r.n_cols - col < 4 ? r.n_cols - col : 4;
      Float4 x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x.v[i] = i < left
                     ? value_of_dot(e, dot_of<kCols>(r, row, col + i), r.first_output + col + i, index + i)
                     : 0.0f;
      }
      if (aligned && left == 4) {
        store_value4(e.values, e.value_type, index, x);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < left) store_value(e.values, e.value_type, index + i, x.v[i]);
        }
      }
    }
  });
}

// One column to a lane; a ballot makes the word.
template <int kRows, int kCols, int kThreads, class Block, class Threads>
BOP2ND_HD void emit_bits(Block& block, Threads& threads, const StagedResult& r, const Epilogue& e) {
  constexpr int kGroups = kCols / 32, kWarps = kThreads / 32, kRounds = kRows * kGroups / kWarps;
  static_assert(kRows * kGroups % kWarps == 0);
  for (int round = 0; round < kRounds; ++round) {
    block.ballot(
        threads,
        [&](int thread, auto&) {
          int unit = round * kWarps + thread / 32, row = unit / kGroups,
              col = unit % kGroups * 32 + thread % 32;
          if (row >= r.n_rows || col >= r.n_cols) return false;
          int dot = dot_of<kCols>(r, row, col), output = r.first_output + col;
          if (e.threshold) return dot < e.threshold[output];
          return value_of_dot(e, dot, output,
                              static_cast<int64_t>(r.first_row + row) * r.n_outputs + output) < 0.0f;
        },
        [&](int thread, auto&, uint32_t word) {
          int unit = round * kWarps + thread / 32, row = unit / kGroups, col = unit % kGroups * 32;
          if (thread % 32 != 0 || row >= r.n_rows || col >= r.n_cols) return;
          int output = r.first_output + col, bit = output % 32;
          uint32_t* target = e.bits + static_cast<int64_t>(r.first_row + row) * e.bit_row_words + output / 32;
          if (!e.scatter_bits) {
            *target = word;
            return;
          }
          if (word << bit) block.atomic_or(target, word << bit);
          if (bit && word >> (32 - bit)) block.atomic_or(target + 1, word >> (32 - bit));
        });
  }
}

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// What an instruction set has to provide: a table of loops over plain memory. No torch, no intrinsics.
#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "../core/epilogue.h"
#include "../core/step_operand.h"

namespace bop2nd {

struct StepHyper {
  float gamma, sigma, a, b;
  float grad_scale;  // inv_scale, negated to maximize: g * (-s) and -(g * s) are the same number
};

struct StepCounts {
  int64_t candidates, flips;
};

// A tensor seen as [outer, groups, length, inner] with element strides; it is packed along `length`.
struct PackShape {
  Dtype dtype;
  int64_t n_outer, outer_stride;
  int64_t n_groups, group_stride;
  int64_t length, length_stride;
  int64_t n_inner, inner_stride;
};

// The outputs of a group lie in blocks of 64, then 32, then 16: in lanes of 8, 16, 32 bits (see matmul.inl).
constexpr int lane_bits_for(int64_t outputs_left) {
  return outputs_left > 48 ? 8 : outputs_left > 16 ? 16 : 32;
}
// Whether odd slices of prepacked weights hold their exclusive or with the slice before. Not where pairs
// could be torn apart because a word is a single slice.
constexpr bool weights_paired(int lane_bits) { return lane_bits < 32; }

// The words that the pixels of a tile see, as `count` wants them: pixel p's are n_runs runs of run_words
// words at image + first_word[p] + run_offset[run]. x_words >= n_runs * run_words is even.
struct PixelTile {
  const uint32_t* image;
  const int64_t* first_word;
  int64_t n_pixels;
  const int32_t* run_offset;
  int64_t n_runs, run_words, x_words;
  int lane_bits;
  uint32_t* slices;  // for the instruction set to use: 4 n_pixels (x_words + 1), and 64 bytes to spare
};

// counts[v][p][i] = sum_k popcount(x[k] ^ w[k]) of pixel p and output 16 v + i of a block of 16, 32 or 64.
// x is what pack_pixels of the same instruction set made. Word k of the weights starts at w + w_offset[k] *
// 512 / lane_bits; with w_contiguous it is k instead of w_offset[k].
struct CountTile {
  const uint32_t* x;
  int64_t n_pixels, x_words, n_words;
  const uint32_t* w;
  const int32_t* w_offset;
  bool w_contiguous;
  int lane_bits;
  uint32_t* counts;
};

// n_pixels by n_outputs, at most 64 (`emit`: 16): dot = bias - 2 * counts[v][p][i]. They belong to output
// pixels out_pixel[p] (nobody wants a negative one) and outputs first_output ... + n_outputs - 1
// (first_output a multiple of 16 where signs are wanted).
struct MatmulTile {
  const uint32_t* counts;
  int64_t n_pixels;
  int32_t bias;  // number of elements in a sum
  const int64_t* out_pixel;
  int64_t first_output, all_outputs;
  int n_outputs;
};

// ---- Processors that multiply tiles of bytes (tiles.inl): 16 rows of 64 bytes, +1, -1, or 0 for nothing.
constexpr int64_t kTileRows = 16, kTileBytes = kTileRows * 64;
// Weights of so many chunks are bytes at a time where they are multiplied only once.
constexpr int64_t kTileRing = 4;

// Words of pixels, x_stride words apart, as 32 n_words bytes each, byte_stride apart. The last word of a
// pixel holds last_channels channels.
struct TilePixels {
  const uint32_t* x;
  int64_t x_stride, n_pixels, n_words;
  int last_channels;
  int8_t* bytes;
  int64_t byte_stride;
};

// One or two words of a sum: where their bytes start, from a pixel's first byte, and which weight words they
// are.
struct TileChunk {
  int64_t x_offset;
  int32_t first_word, n_words;
};

// Products of tiles: pixels of one group by columns (16 outputs) first_column .. last_column - 1,
// first_column even.
struct TileWork {
  const int8_t* x;
  int64_t pixel_bytes;
  const int64_t* x_offset;   // [n_tiles]: where tiles of 16 pixels start
  const int64_t* out_pixel;  // [n_tiles, 16]: of the output, -1 for none
  int64_t n_tiles;
  const TileChunk* chunks;
  int64_t n_chunks;
  const uint32_t* w;  // of the group, as prepack_weight lays it
  int64_t row_words, outputs;
  int64_t first_column, last_column;
  int64_t first_output, all_outputs;  // of the group, in the output
  bool ring;      // unpack weights again for every 32 pixels, right before they are multiplied
  int8_t* tiles;  // for weights, 2 n_chunks (with `ring` 2 kTileRing); on a cache line
  const Epilogue* to;
  int32_t* sums;  // not null: dots go there and to no epilogue, tile after tile [16, sum_stride]
  int64_t sum_stride;
};

struct TileTable {
  void (*pixels)(const TilePixels&);
  void (*multiply)(const TileWork&);
  // Bytes in their order, n of them (a multiple of 64), into that of the tiles.
  void (*order_bytes)(int8_t* bytes, int64_t n);
};

// ---- Sums of real numbers with signs, for gradients (signed_sums.inl).
// sums[segment][i][lane] += sum_k +-a[k][lane], negative where bit k % 32 of signs[k / 32][segment][i] is
// set; k runs to 32 n_chunks, lane to SumTable::lanes. Of the last chunk only `last_rows` are looked at: the
// others are 0.
struct SignedSums {
  const float* a;
  int64_t a_stride, n_chunks;
  const uint32_t* signs;
  int64_t chunk_stride, n_segments, segment_stride, n;
  float* sums;
  bool fresh;
  int64_t last_rows = 32;
};

struct SumTable {
  int lanes;
  void (*signed_sums)(const SignedSums&);
  // to[i] += `lanes` numbers of from[i].
  void (*add_sums)(const float* from, int64_t n, float* to, int64_t to_stride);
  // to[32 w + i]: bit i of the w-th word of 32 rows, one bit for each row.
  void (*transpose_bits)(const uint32_t* const* rows, int64_t n_words, uint32_t* to);
  // to[column][row] = from[row][column].
  void (*transpose)(const float* from, int64_t from_stride, int64_t n_rows, int64_t n_columns, float* to,
                    int64_t to_stride);
  void (*load_reals)(Dtype dtype, const void* from, int64_t n, float* to);
  // With a mask, those whose bit is 0 become 0.
  void (*store_reals)(const float* from, int64_t n, const uint32_t* mask, Dtype dtype, void* to);
};

// ---- Real numbers, for the runtime (real.inl): fp32, fused multiply-adds where the processor has them.

// Sums of products of some pixels with the weights of one block of outputs:
//   to[p * to_stride + o] = bias[o] + sum_k x[pixel[p] + k_offset[k]] * w[k * block + o],  k in order.
struct RealTile {
  const float* x;
  const int64_t* pixel;
  int64_t n_pixels;
  const int64_t* k_offset;
  int64_t n_k;
  const float* w;     // [n_k][RealTable::block], 0 behind the last output
  const float* bias;  // or null
  int64_t n_outputs;  // at most RealTable::block
  float* to;
  int64_t to_stride;
};

// The taps of one window over rows of n channels: to[c] = max or sum of x[offset[t] + c]; with weights the
// sum of x[offset[t] + c] * w[w_offset[t] + c].
struct RealWindow {
  const float* x;
  const int64_t* offset;
  int64_t n_taps, n;
  const float* w;
  const int64_t* w_offset;
  const float* bias;
  float* to;
};

// a + alpha b, a - alpha b, a b, a / b, a > 0 ? a : a b. With alpha 1 every operation is rounded by itself.
enum class RealOperation : int { kAdd, kSub, kMul, kDiv, kPrelu };

struct RealTable {
  int64_t block;  // outputs of a block of weights
  void (*multiply)(const RealTile&);
  void (*window_max)(const RealWindow&);  // NaN where one of them is
  void (*window_sum)(const RealWindow&);
  void (*window_products)(const RealWindow&);
  // n elements; steps between them are 0 or 1.
  void (*binary)(RealOperation, int64_t n, const float* a, int64_t a_step, const float* b, int64_t b_step,
                 float alpha, float* to);
  // x * scale + shift, and the same rounded once
  void (*affine)(int64_t n, const float* x, int64_t x_step, const float* scale, const float* shift,
                 int64_t channel_step, float* to);
  void (*fused_affine)(int64_t n, const float* x, int64_t x_step, const float* scale, const float* shift,
                       int64_t channel_step, float* to);
  void (*clamp)(int64_t n, const float* x, int64_t x_step, float low, float high, float* to);
};

// ---- Signs times real numbers and 8-bit integers (signed_lookup.inl, signed_bytes.inl, signed_emit.inl).
// Sums of one row for the outputs of blocks first .. last - 1 (16 outputs each; where blocks of 64 and 32
// start, see prepack_weight). Real: table `i` of 16 holds the sums of 4 numbers from 4 i on, and `sums` are
// floats. 8 row_words tables, all numbers 32-bit.
struct LookupWork {
  const uint32_t* tables;
  const uint32_t* w;  // as prepack_weight lays it
  int64_t row_words, outputs;
  int64_t first_block, last_block;
  uint32_t* sums;  // [16 (last_block - first_block)]
};

// sums[row][output] of rows of 32 row_words unsigned bytes, for the outputs of such blocks.
struct ByteWork {
  const uint8_t* x;
  int64_t row_bytes, n_rows;  // from row to row
  const uint32_t* w;
  int64_t row_words, outputs;
  int64_t first_block, last_block;
  int32_t* sums;
  int64_t sum_stride;
  int8_t* panel;  // kBytePanelBytes, on a cache line
};
constexpr int64_t kBytePanelWords = 8, kBytePanelBytes = kBytePanelWords * 32 * 64;

// Rows of sums, fp32 or int32, and what becomes of them. dot = multiplier * sum + correction[row][output].
struct SignedRows {
  const void* sums;  // 64 bytes to spare behind
  int64_t sum_stride, n_rows;
  int32_t multiplier;
  const int32_t* const* correction;  // [n_rows], or null; from output 0 of all on, 64 bytes to spare
  const float* const* input_scale;   // [n_rows], or null
  int64_t first_pixel, first_output, n_outputs, all_outputs;
};

struct SignedTable {
  void (*look_up_reals)(const LookupWork&);
  void (*look_up_integers)(const LookupWork&);
  void (*multiply_bytes)(const ByteWork&);
  void (*emit_reals)(const SignedRows&, const Epilogue&);
  void (*emit_integers)(const SignedRows&, const Epilogue&);
  // A row's largest magnitude; NaN or infinity where it has one.
  float (*largest)(const float* x, int64_t n);
  void (*quantize)(const float* x, int64_t n, float scale, int8_t* to);
};

struct KernelTable {
  // `length_stride == 1`: rows [begin, end) of n_outer * n_inner. `mask` may be null.
  void (*pack_rows)(const PackShape&, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                    int64_t end);
  // `inner_stride == 1`: pixels [begin, end) of n_outer * n_inner.
  void (*pack_columns)(const PackShape&, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                       int64_t end);
  // Rows [begin, end) of `length` elements each.
  void (*unpack_rows)(const uint32_t* words, int64_t length, Dtype dtype, void* out, int64_t begin,
                      int64_t end);
  void (*pack_pixels)(const PixelTile&);
  // Counts a tile and does with the counts, which it need not leave in memory, what the epilogue says.
  void (*multiply)(const CountTile&, const MatmulTile&, const Epilogue&);
  const SumTable* sums;
  const TileTable* tiles;  // null where the processor has none
  const RealTable* reals;
  const SignedTable* signed_products;
};

struct ConvShape;

// What only training needs; a library for inference is linked without it.
struct TrainingTable {
  // Words [first_word, first_word + n_words) of one tensor (dense: blocks of 32 elements); adds to `counts`.
  void (*step)(const StepOperand&, const StepHyper&, int64_t first_word, int64_t n_words, StepCounts* counts);
  // Clears the elements of rows [begin, end) of `grad` whose mask bit is 0.
  void (*apply_mask)(const uint32_t* mask, int64_t length, Dtype dtype, void* grad, int64_t begin,
                     int64_t end);
  // Convolutions whose groups have one channel and one output. Gradients of the weights of n <= lanes
  // channels from `first` on, sums[tap][lanes]; of lines [begin, end) of batch * height of the input, from
  // signs[tap][channel], with `seen` as memory for 2 taps.
  void (*depthwise_weights)(const ConvShape&, Dtype, const void* grad, const uint32_t* x, int64_t first,
                            int n, float* sums);
  void (*depthwise_inputs)(const ConvShape&, Dtype, const void* grad, const uint32_t* signs,
                           const uint32_t* mask, void* to, int64_t* seen, int64_t begin, int64_t end);
};

// What the loops are measured against; never part of an operator.
struct YardstickTable {
  // The memory accesses of `step` with packed weights, and next to no arithmetic: gradients of 4 or 2 bytes,
  // moments of 4, or 2 with gradients of 2. What lies there stays as it is.
  void (*stream)(const void* grad, void* m, void* v, uint32_t* words, int grad_bytes, int state_bytes,
                 int64_t first_word, int64_t n_words);
  // Reads one array and writes another, whole vectors of 4-byte elements; the next to no arithmetic again.
  void (*traffic)(const uint32_t* read, int64_t n_read, uint32_t* write, int64_t n_written);
  // The instructions that `multiply` counts with, without memory accesses; returns the multiply-accumulates
  // it stands for.
  double (*register_loop)(int64_t iterations);
};

}  // namespace bop2nd

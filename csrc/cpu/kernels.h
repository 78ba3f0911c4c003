// SPDX-License-Identifier: Apache-2.0
// What an instruction set has to provide: a table of loops over plain memory. No torch, no intrinsics.
#pragma once

#include <cstdint>

namespace bop2nd {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kPacked };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// One parameter of the step, in walk order. Packed weights: `rows` rows of `length` elements, each padded
// to whole words. Dense weights: one row. State and gradient are contiguous and not padded.
struct StepTensor {
  void* weight;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;  // null for Bop
  Dtype weight_dtype, grad_dtype, state_dtype;
  int64_t rows, length;
  uint32_t key;  // rounding_key of this tensor, for bf16 state
};

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

// What becomes of the dot products of all pixels and outputs: values, sign words, or both.
//   value = dot (* scale[o]) (+ shift[o]) (+ residual[p][o])    in fp32, each operation rounded on its own
//   bit   = dot < threshold[o], without thresholds value < 0
struct Epilogue {
  Dtype dtype = Dtype::kFloat32;       // of `values` and `residual`
  void* values = nullptr;              // [pixels, outputs]
  uint16_t* signs = nullptr;           // [pixels, 2 words_for(outputs)]: words as halves of 16 outputs
  const int32_t* threshold = nullptr;  // [outputs]
  const float* scale = nullptr;        // [outputs]
  const float* shift = nullptr;        // [outputs]
  const void* residual = nullptr;      // like `values`

  bool only_values() const { return !signs && !scale && !shift && !residual; }
};

// n_pixels x 16 outputs: dot = bias - 2 * sum_k popcount(x[k] ^ w[k]).
// Pixel p's words are x[p * n_words ...], in pairs if the table says so (odd words are the exclusive or with
// the one before). Word k of the weights is at w + w_offset[k], 16 outputs side by side; w_contiguous says
// that w_offset[k] == w_offset[0] + 16 k. The results belong to output pixels out_pixel[p] and outputs
// first_output ... + n_outputs - 1 (1..16 of them, first_output a multiple of 16 where signs are wanted).
struct MatmulTile {
  const uint32_t* x;
  int64_t n_pixels, n_words;
  const uint32_t* w;
  const int32_t* w_offset;
  bool w_contiguous;
  int32_t bias;  // number of elements in a sum
  const int64_t* out_pixel;
  int64_t first_output, all_outputs;
  int n_outputs;
  uint32_t* scratch;  // 16 * (n_pixels + n_words)
};

struct KernelTable {
  // Words [first_word, first_word + n_words) of one tensor (dense: blocks of 32 elements); adds to `counts`.
  void (*step)(const StepTensor&, const StepHyper&, int64_t first_word, int64_t n_words, StepCounts* counts);
  // `length_stride == 1`: rows [begin, end) of n_outer * n_inner. `mask` may be null.
  void (*pack_rows)(const PackShape&, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                    int64_t end);
  // `inner_stride == 1`: pixels [begin, end) of n_outer * n_inner.
  void (*pack_columns)(const PackShape&, const void* x, uint32_t* signs, uint32_t* mask, int64_t begin,
                       int64_t end);
  // Rows [begin, end) of `length` elements each.
  void (*unpack_rows)(const uint32_t* words, int64_t length, Dtype dtype, void* out, int64_t begin,
                      int64_t end);
  // Clears the elements of those rows of `grad` whose mask bit is 0.
  void (*apply_mask)(const uint32_t* mask, int64_t length, Dtype dtype, void* grad, int64_t begin,
                     int64_t end);
  void (*matmul)(const MatmulTile&, const Epilogue&);
  bool paired_words;  // how matmul wants the words of x
  // The memory accesses of `step` with fp32 state and packed weights, and next to no arithmetic.
  void (*stream)(const float* grad, float* m, float* v, uint32_t* words, int element_bytes,
                 int64_t first_word, int64_t n_words);
  // The instructions of `matmul` without its memory accesses; returns the multiply-accumulates it stands for.
  double (*register_loop)(int64_t iterations);
};

}  // namespace bop2nd

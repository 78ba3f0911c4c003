// SPDX-License-Identifier: Apache-2.0
// The operators on plain memory: they cut the work into parts, run them on the pool and leave the loops to
// the instruction set in use. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/conv_shape.h"
#include "kernels.h"

namespace bop2nd {

// One step of all tensors; counts[2 i] and counts[2 i + 1] become candidates and flips of tensor i.
void bop_step(const std::vector<StepOperand>& tensors, const StepHyper& hyper, int64_t* counts);

// The strides of `shape` must have length_stride == 1 or inner_stride == 1. `mask` may be null.
void pack(const PackShape& shape, const void* x, uint32_t* signs, uint32_t* mask);
void unpack(const uint32_t* words, int64_t n_rows, int64_t length, Dtype dtype, void* out);

// Clears the elements of `grad` (n_rows of `length`) whose mask bit is 0.
void apply_mask(const uint32_t* mask, int64_t n_rows, int64_t length, Dtype dtype, void* grad);

// Weight words [out_channels, taps, group_words] -> [groups, group_blocks * taps * group_words * 16], as
// CountTile wants them.
void prepack_weight(const uint32_t* words, int64_t out_channels, int64_t groups, int64_t row_words,
                    uint32_t* blocked);

// x: [batch, height, width, groups * group_words]; the pixels of `to` are [batch, out height, out width].
void binary_conv(const ConvShape& shape, const uint32_t* x, const uint32_t* blocked, const Epilogue& to);

// The dots alone, every output a plane: [batch, out_channels, out height, out width].
void binary_conv_planes(const ConvShape& shape, const uint32_t* x, const uint32_t* blocked, Dtype dtype,
                        void* to);

// [n_images, rows, columns] -> [n_images, columns, rows].
void transpose_images(Dtype dtype, const void* from, int64_t n_images, int64_t rows, int64_t columns,
                      void* to);

// Gradients from grad, [batch, out height, out width, out_channels]: of the weights as fp32
// [out_channels, taps, group_channels] from the words x that binary_conv saw; of the input as grad's dtype
// [batch, height, width, channels] from the words w [out_channels, taps, group_words], cleared where `mask`
// (laid out like x, may be null) has a 0.
void conv_weight_gradient(const ConvShape& shape, Dtype dtype, const void* grad, const uint32_t* x,
                          float* to);
void conv_input_gradient(const ConvShape& shape, Dtype dtype, const void* grad, const uint32_t* w,
                         const uint32_t* mask, void* to);

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// The operators on plain memory: they cut the work into parts, run them on the pool and leave the loops to
// the instruction set in use. No torch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bop2nd {

// One step of all tensors; counts[2 i] and counts[2 i + 1] become candidates and flips of tensor i.
void bop_step(const std::vector<StepTensor>& tensors, const StepHyper& hyper, int64_t* counts);

// The strides of `shape` must have length_stride == 1 or inner_stride == 1. `mask` may be null.
void pack(const PackShape& shape, const void* x, uint32_t* signs, uint32_t* mask);
void unpack(const uint32_t* words, int64_t n_rows, int64_t length, Dtype dtype, void* out);

// Clears the elements of `grad` (n_rows of `length`) whose mask bit is 0.
void apply_mask(const uint32_t* mask, int64_t n_rows, int64_t length, Dtype dtype, void* grad);

// A convolution; a linear layer is one with height = width = kernel = 1.
struct ConvShape {
  int64_t batch, height, width;  // of the input
  int64_t channels, groups;      // input channels, of all groups
  int64_t out_channels;          // of all groups
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int padding_value;  // 0, 1 or -1

  int64_t group_channels() const { return channels / groups; }
  int64_t group_words() const { return (group_channels() + 31) / 32; }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t group_blocks() const { return (group_outputs() + 15) / 16; }
  // Every output pixel sees just the input pixel at its place.
  bool pointwise() const { return taps() == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0; }
  bool depthwise() const { return groups == channels && groups == out_channels; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t out_size(int axis) const;  // 0 height, 1 width
};

// Weight words [out_channels, taps, group_words] -> [groups, group_blocks * taps * group_words * 16], as
// CountTile wants them.
void block_weight(const uint32_t* words, int64_t out_channels, int64_t groups, int64_t row_words,
                  uint32_t* blocked);

// x: [batch, height, width, groups * group_words]; the pixels of `to` are [batch, out height, out width].
void binary_conv(const ConvShape& shape, const uint32_t* x, const uint32_t* blocked, const Epilogue& to);

// Gradients from grad, [batch, out height, out width, out_channels]: of the weights as fp32
// [out_channels, taps, group_channels] from the words x that binary_conv saw; of the input as grad's dtype
// [batch, height, width, channels] from the words w [out_channels, taps, group_words], cleared where `mask`
// (laid out like x, may be null) has a 0.
void conv_weight_gradient(const ConvShape& shape, Dtype dtype, const void* grad, const uint32_t* x,
                          float* to);
void conv_input_gradient(const ConvShape& shape, Dtype dtype, const void* grad, const uint32_t* w,
                         const uint32_t* mask, void* to);

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// The geometry of a binary convolution; a linear layer is one of 1x1 images with a 1x1 kernel.
//
// THE LIMITS, the same as in kernels/geometry.py. `checked` refuses what breaks them before anything is
// computed from sizes, itself with overflow checks; behind it no product of sizes wraps, and offsets of a tap
// fit int32.
//   1. stride, dilation, kernel and groups are at least 1, padding, batch, channels, outputs and image at
//   least 0;
//      all of them and the padded image (size + 2 padding, along each axis) are below 2^31.
//   2. The kernel with its dilation fits into the padded image. groups divides channels and outputs, and
//   there are
//      no more groups than channels or outputs.
//   3. Words of the padded input, all images, and of the weight are below 2^31.
//   4. Products that make one output (taps * channels of a group) are below 2^24: fp32 holds every dot
//   exactly.
//   5. Elements of the output, and the products of the whole convolution, are below 2^60.
// In 3 and 5 a size of 0 counts as 1: loops run over sizes whose product is nothing.
// Limits: host only; no torch.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "bit_layout.h"

namespace bop2nd {

constexpr int64_t kMaxInt32 = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxDot = (int64_t{1} << 24) - 1, kMaxCount = (int64_t{1} << 60) - 1;

// Sizes of nothing are a linear layer's.
struct ConvShape {
  int64_t batch = 0, height = 1, width = 1;  // of the input
  int64_t channels = 0, groups = 1;          // input channels, of all groups
  int64_t out_channels = 0;                  // of all groups
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int padding_value = 0;  // 0, 1 or -1

  int64_t group_channels() const { return channels / groups; }
  int64_t group_words() const { return words_for(group_channels()); }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t group_blocks() const { return (group_outputs() + 15) / 16; }
  // Every output pixel sees just the input pixel at its place.
  bool pointwise() const { return taps() == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0; }
  bool depthwise() const { return groups == channels && groups == out_channels; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t in_size(int axis) const { return axis == 0 ? height : width; }  // 0 height, 1 width
  // From the first position of a kernel to its last in the padded image.
  int64_t room(int axis) const {
    return in_size(axis) + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
  }
  int64_t out_size(int axis) const { return room(axis) / stride[axis] + 1; }
  int64_t out_pixels() const { return batch * out_size(0) * out_size(1); }
  // Multiply-accumulates.
  int64_t products() const { return out_pixels() * out_channels * taps() * group_channels(); }
};

namespace limits {

inline std::string text_of(const ConvShape& s) {
  auto pair = [](const int64_t (&of)[2]) {
    return "(" + std::to_string(of[0]) + ", " + std::to_string(of[1]) + ")";
  };
  return std::to_string(s.batch) + " images of (" + std::to_string(s.height) + ", " +
         std::to_string(s.width) + "), " + std::to_string(s.channels) + " channels, " +
         std::to_string(s.out_channels) + " outputs, kernel " + pair(s.kernel) + ", stride " +
         pair(s.stride) + ", padding " + pair(s.padding) + ", dilation " + pair(s.dilation) + ", groups " +
         std::to_string(s.groups);
}

// Whether the product of the factors, at least 1 each, is at most `most`.
inline bool fits(std::initializer_list<int64_t> factors, int64_t most) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(product, std::max<int64_t>(1, factor), &product) || product > most)
      return false;
  }
  return true;
}

}  // namespace limits

// `s`, if it keeps the limits. A stride past the last position and a dilation of a single tap, which change
// nothing, become as small as they can.
// Throws std::invalid_argument (a ValueError in Python) that names the sizes and the limit.
inline ConvShape checked(ConvShape s) {
  auto require = [&s](bool kept, const char* what) {
    if (!kept) throw std::invalid_argument("a binary convolution of " + limits::text_of(s) + ": " + what);
  };
  auto within = [](int64_t n, int64_t least) { return n >= least && n <= kMaxInt32; };
  require(within(s.batch, 0) && within(s.height, 0) && within(s.width, 0) && within(s.channels, 0) &&
              within(s.out_channels, 0),
          "images, channels and outputs must be 0 to 2**31 - 1");
  require(within(s.groups, 1) && s.channels % s.groups == 0 && s.out_channels % s.groups == 0,
          "groups must divide input and output channels");
  require(s.groups <= std::max<int64_t>(1, std::max(s.channels, s.out_channels)),
          "there are more groups than channels or outputs");
  require(s.padding_value >= -1 && s.padding_value <= 1, "padding_value must be 0, 1 or -1");
  int64_t padded[2];
  for (int axis = 0; axis < 2; ++axis) {
    require(within(s.kernel[axis], 1) && within(s.stride[axis], 1) && within(s.dilation[axis], 1) &&
                within(s.padding[axis], 0),
            "kernel, stride and dilation must be 1 to 2**31 - 1, padding 0 to 2**31 - 1");
    padded[axis] = s.in_size(axis) + 2 * s.padding[axis];
    require(padded[axis] <= kMaxInt32, "the padded image must be below 2**31 along each axis");
    require(s.room(axis) >= 0, "the padded image is smaller than the kernel with its dilation");
  }
  require(limits::fits({s.batch, padded[0], padded[1], s.groups, s.group_words()}, kMaxInt32),
          "the words of the padded input must be below 2**31");
  require(limits::fits({s.out_channels, s.kernel[0], s.kernel[1], s.group_words()}, kMaxInt32),
          "the words of the weight must be below 2**31");
  require(limits::fits({s.kernel[0], s.kernel[1], s.group_channels()}, kMaxDot),
          "the products of one output must be below 2**24");
  require(limits::fits({s.batch, s.out_size(0), s.out_size(1), s.out_channels, s.taps(), s.group_channels()},
                       kMaxCount),
          "the products of the whole must be below 2**60");
  for (int axis = 0; axis < 2; ++axis) {
    s.stride[axis] = std::min(s.stride[axis], s.room(axis) + 1);
    if (s.kernel[axis] == 1) s.dilation[axis] = 1;
  }
  return s;
}

}  // namespace bop2nd

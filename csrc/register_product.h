// SPDX-License-Identifier: Apache-2.0
// What the bindings of products share: the geometry of their operands, checked before anything is computed
// from it, and which operands belong to it.
#pragma once

#include "core/conv_shape.h"
#include "register_tensor.h"

namespace bop2nd::binding {

constexpr int64_t kMaxExtent = int64_t{1} << 54;

// Sizes must be `sizes` exactly.
inline void check_sizes(const Tensor& t, const Ints& sizes, const char* what) {
  Ints found = sizes_of(t);
  BOP2ND_REQUIRE(found == sizes, what, " must be ", text_of(sizes), ", got ", text_of(found));
}

// A tensor of no elements may have other sizes of any magnitude: what follows from them is bounded.
inline void check_extent(const Tensor& t, const char* what) {
  int64_t extent = 1;
  for (int64_t size : t.sizes()) {
    bool fits = !__builtin_mul_overflow(extent, std::max<int64_t>(1, size), &extent) && extent < kMaxExtent;
    BOP2ND_REQUIRE(fits, what, " ", text_of(sizes_of(t)),
                   " is beyond 2**54 elements, where a size of 0 counts as 1");
  }
}

// [outputs, words]; `features` of each row.
inline ConvShape linear_shape(int64_t rows, int64_t features, const Tensor& weight) {
  check_words(weight, "weight");
  BOP2ND_REQUIRE(weight.dim() == 2 && features >= 0 && weight.size(1) == words_for(features), "weight words ",
                 text_of(sizes_of(weight)), " do not fit ", features, " input features");
  return checked({rows, 1, 1, features, 1, weight.size(0), {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0});
}

// [outputs, kernel rows, kernel columns, words of a group]; images and their size.
inline ConvShape conv_shape(int64_t batch, int64_t height, int64_t width, int64_t channels,
                            const Tensor& weight, const Ints& stride, const Ints& padding,
                            const Ints& dilation, int64_t groups, int64_t padding_value) {
  check_words(weight, "weight");
  BOP2ND_REQUIRE(weight.dim() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                 "weight must be [O, kH, kW, words] and stride, padding, dilation two numbers");
  BOP2ND_REQUIRE(padding_value >= -1 && padding_value <= 1, "padding_value must be 0, 1 or -1");
  ConvShape s = checked({batch,
                         height,
                         width,
                         channels,
                         groups,
                         weight.size(0),
                         {weight.size(1), weight.size(2)},
                         {stride[0], stride[1]},
                         {padding[0], padding[1]},
                         {dilation[0], dilation[1]},
                         static_cast<int>(padding_value)});
  BOP2ND_REQUIRE(weight.size(3) == s.group_words(), "weight words ", text_of(sizes_of(weight)),
                 " do not fit ", channels, " input channels in ", groups, " groups");
  return s;
}

// What a backward pass is given, besides the shape: `saved` are the sizes of the words of the input.
inline void check_saved(const Tensor& grad, const Ints& grad_sizes, const Tensor& signs, const Tensor& mask,
                        const Ints& saved) {
  check_words(signs, "signs"), check_words(mask, "mask");
  check_sizes(grad, grad_sizes, "grad_output");
  check_sizes(signs, saved, "signs");
  if (sizes_of(mask) != Ints{0}) check_sizes(mask, saved, "mask (or empty)");
}

}  // namespace bop2nd::binding

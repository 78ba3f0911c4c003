// SPDX-License-Identifier: Apache-2.0
// A convolution seen as a matrix product without im2col: row m of the left operand is output pixel m, its k
// words are (tap, word) of the packed image [N, H, W, groups * words(C / groups)], read where they lie. A
// linear layer is the case of 1x1 images. Border arithmetic makes zero, +1 and -1 padding exact:
//
//   padded taps are read as zero words, that is as +1. Over them the product adds C_g - 2 P(o, tap), with
//   P the number of -1 in the tap's weights; padding value p wants p * (C_g - 2 P). So
//       dot += (1 - p) * sum over padded taps of (2 P(o, tap) - C_g).
//
// Which taps are padded depends only on the border class of the pixel: its row class x its column class.
// A view is made on the host from a shape that keeps the limits of core/conv_shape.h, and travels by value.
// Limits: no CUDA header, compiles for host and device; those of core/conv_shape.h, and images below 2^30
// pixels along an axis, rows and outputs a tile below 2^31 (`fits`).
#pragma once

#include "../core/conv_shape.h"
#include "tile.h"

namespace bop2nd::cuda {

// A coordinate (negated) or an aligned offset outside everything.
constexpr int kOutside = 1 << 30;

// One axis of the image.
struct Axis {
  int size = 1, out = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  int top = 0, bottom = 0;  // outputs at either end that see padding; all of them if they overlap

  Axis() = default;
  Axis(const ConvShape& s, int axis)
      : size(static_cast<int>(s.in_size(axis))),
        out(static_cast<int>(s.out_size(axis))),
        kernel(static_cast<int>(s.kernel[axis])),
        stride(static_cast<int>(s.stride[axis])),
        padding(static_cast<int>(s.padding[axis])),
        dilation(static_cast<int>(s.dilation[axis])) {
    top = padding <= 0 ? 0 : (padding + stride - 1) / stride;  // o * stride < padding
    int reach = dilation * (kernel - 1) - padding;             // o * stride + reach >= size
    int first = size - reach <= 0 ? 0 : (size - reach + stride - 1) / stride;
    bottom = out > first ? out - first : 0;
    if (top + bottom >= out) {
      top = out;
      bottom = 0;
    }
  }
  BOP2ND_HD int position(int o, int k) const { return o * stride - padding + k * dilation; }
  BOP2ND_HD bool inside(int at) const { return static_cast<unsigned>(at) < static_cast<unsigned>(size); }
  // Every output near an end is a class of its own; those between share one.
  BOP2ND_HD int n_classes() const { return top == out ? out : top + 1 + bottom; }
  BOP2ND_HD int class_of(int o) const {
    return o < top ? o : o < out - bottom ? top : top + 1 + o - (out - bottom);
  }
  BOP2ND_HD int output_of(int border_class) const {
    return border_class <= top ? border_class : out - bottom + border_class - top - 1;
  }
};

struct Pixel {
  int image, y, x;  // output coordinates
};

struct Tap {
  int ky, kx, word;  // word within the group's words of one pixel
};

struct ConvView {
  Axis vertical, horizontal;
  int n_images = 1, groups = 1;
  int group_channels = 0, group_words = 0, group_outputs = 0;
  int padding_value = 0;
  FastDivide by_pixels, by_out_width, by_group_words, by_kernel_width;

  ConvView() = default;
  explicit ConvView(const ConvShape& s)
      : vertical(s, 0),
        horizontal(s, 1),
        n_images(static_cast<int>(s.batch)),
        groups(static_cast<int>(s.groups)),
        group_channels(static_cast<int>(s.group_channels())),
        group_words(static_cast<int>(s.group_words())),
        group_outputs(static_cast<int>(s.group_outputs())),
        padding_value(s.padding_value),
        by_pixels(static_cast<uint32_t>(vertical.out * horizontal.out)),
        by_out_width(static_cast<uint32_t>(horizontal.out)),
        by_group_words(static_cast<uint32_t>(group_words < 1 ? 1 : group_words)),
        by_kernel_width(static_cast<uint32_t>(horizontal.kernel)) {}

  // Whether a kernel may be given this shape: a block counts its rows and columns from its first one on, past
  // the last, and rows that do not exist lie kOutside plus an offset of a tap.
  static bool fits(const ConvShape& s) {
    constexpr int64_t kTile = 256;
    auto below = [&s](int axis) { return s.in_size(axis) + 2 * s.padding[axis] < kOutside; };
    return s.out_pixels() <= kMaxInt32 - kTile && s.out_channels <= kMaxInt32 - kTile && below(0) && below(1);
  }

  BOP2ND_HD int n_taps() const { return vertical.kernel * horizontal.kernel; }
  BOP2ND_HD int k_words() const { return n_taps() * group_words; }
  BOP2ND_HD int k_elements() const { return n_taps() * group_channels; }
  BOP2ND_HD int pixel_words() const { return groups * group_words; }
  BOP2ND_HD int n_rows() const { return n_images * vertical.out * horizontal.out; }
  BOP2ND_HD int n_outputs() const { return groups * group_outputs; }
  BOP2ND_HD int n_classes() const { return vertical.n_classes() * horizontal.n_classes(); }
  BOP2ND_HD int n_stages(int stage_words) const { return (k_words() + stage_words - 1) / stage_words; }

  BOP2ND_HD Pixel pixel(int row) const {
    uint32_t image = by_pixels.quotient(static_cast<uint32_t>(row));
    uint32_t within = static_cast<uint32_t>(row) - image * by_pixels.divisor;
    uint32_t y = by_out_width.quotient(within);
    Pixel p{};
    p.image = static_cast<int>(image), p.y = static_cast<int>(y);
    p.x = static_cast<int>(within - y * by_out_width.divisor);
    return p;
  }
  BOP2ND_HD Tap tap(int k_word) const {
    uint32_t t = by_group_words.quotient(static_cast<uint32_t>(k_word));
    uint32_t ky = by_kernel_width.quotient(t);
    Tap tap{};
    tap.ky = static_cast<int>(ky), tap.kx = static_cast<int>(t - ky * by_kernel_width.divisor);
    tap.word = static_cast<int>(static_cast<uint32_t>(k_word) - t * by_group_words.divisor);
    return tap;
  }
  // Pixel index (image, row, column) of the input under a tap, or -1 in the padding.
  BOP2ND_HD int input_pixel(const Pixel& p, int ky, int kx) const {
    int y = vertical.position(p.y, ky), x = horizontal.position(p.x, kx);
    if (!vertical.inside(y) || !horizontal.inside(x)) return -1;
    return (p.image * vertical.size + y) * horizontal.size + x;
  }
  BOP2ND_HD int class_of(const Pixel& p) const {
    return vertical.class_of(p.y) * horizontal.n_classes() + horizontal.class_of(p.x);
  }
  // Some pixel of a class; its image does not matter.
  BOP2ND_HD Pixel pixel_of_class(int border_class) const {
    int across = horizontal.n_classes();
    Pixel p{};
    p.y = vertical.output_of(border_class / across), p.x = horizontal.output_of(border_class % across);
    return p;
  }
};

}  // namespace bop2nd::cuda

// SPDX-License-Identifier: Apache-2.0
// Shapes for the tests of csrc/cuda, in one line each.
#pragma once

#include "../../csrc/cuda/conv_view.h"

namespace bop2nd::cuda {

struct Line {  // one axis
  int64_t size, kernel, stride, padding, dilation;
};

inline ConvShape conv_shape(int64_t images, Line y, Line x, int64_t groups, int64_t group_channels,
                            int64_t group_outputs, int padding_value = 0) {
  ConvShape s;
  s.batch = images, s.height = y.size, s.width = x.size, s.groups = groups;
  s.channels = groups * group_channels, s.out_channels = groups * group_outputs;
  for (int axis = 0; axis < 2; ++axis) {
    const Line& line = axis == 0 ? y : x;
    s.kernel[axis] = line.kernel, s.stride[axis] = line.stride;
    s.padding[axis] = line.padding, s.dilation[axis] = line.dilation;
  }
  s.padding_value = padding_value;
  return checked(s);
}

inline ConvView conv_view(int64_t images, Line y, Line x, int64_t groups, int64_t group_channels,
                          int64_t group_outputs, int padding_value = 0) {
  return ConvView(conv_shape(images, y, x, groups, group_channels, group_outputs, padding_value));
}

inline ConvView linear_view(int64_t rows, int64_t features, int64_t outputs) {
  ConvShape s;
  s.batch = rows, s.channels = features, s.out_channels = outputs;
  return ConvView(checked(s));
}

}  // namespace bop2nd::cuda

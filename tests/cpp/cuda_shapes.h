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
  return checked({images,
                  y.size,
                  x.size,
                  groups * group_channels,
                  groups,
                  groups * group_outputs,
                  {y.kernel, x.kernel},
                  {y.stride, x.stride},
                  {y.padding, x.padding},
                  {y.dilation, x.dilation},
                  padding_value});
}

inline ConvView conv_view(int64_t images, Line y, Line x, int64_t groups, int64_t group_channels,
                          int64_t group_outputs, int padding_value = 0) {
  return ConvView(conv_shape(images, y, x, groups, group_channels, group_outputs, padding_value));
}

inline ConvView linear_view(int64_t rows, int64_t features, int64_t outputs) {
  return conv_view(rows, {1, 1, 1, 0, 1}, {1, 1, 1, 0, 1}, 1, features, outputs);
}

}  // namespace bop2nd::cuda

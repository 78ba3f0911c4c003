// SPDX-License-Identifier: Apache-2.0
// Pools over images with channels nearest, of real numbers and of words.
#include <algorithm>

#include "../cpu/parallel.h"
#include "operators.h"
#include "plan.h"
#include "windows.h"

namespace bop2nd::runtime {

Taps taps_at(const Geometry& g, int axis, int64_t size, int64_t output) {
  int64_t at = output * g.stride[axis] - g.padding[axis], d = g.dilation[axis];
  int64_t begin = at >= 0 ? 0 : (-at + d - 1) / d;
  int64_t end = at >= size ? 0 : std::min(g.kernel[axis], (size - 1 - at) / d + 1);
  return {.at = at, .begin = begin, .end = std::max(begin, end)};
}

int64_t window_outputs(const Planner& planner, const Geometry& g, int axis, int64_t size) {
  int64_t reach;
  planner.check(
      size < (int64_t{1} << 31) && !__builtin_mul_overflow(g.dilation[axis], g.kernel[axis] - 1, &reach),
      "an image or window is too large");
  int64_t span = size + 2 * g.padding[axis] - reach - 1;
  planner.check(span >= 0 && size > 0, "an image is smaller than the window");
  int64_t n = (g.ceil_mode ? span + g.stride[axis] - 1 : span) / g.stride[axis] + 1;
  if (g.ceil_mode && (n - 1) * g.stride[axis] >= size + g.padding[axis]) --n;
  planner.check(n >= 1, "an image is smaller than the window");
  return n;
}

Geometry pool_geometry(const Layer& layer) {
  Geometry g{};
  g.kernel = layer.kernel_size, g.stride = layer.stride, g.padding = layer.padding;
  g.dilation = layer.dilation, g.ceil_mode = layer.ceil_mode;
  return g;
}

RealWindow unweighted(const float* x, const std::vector<int64_t>& offsets, int64_t n, float* to) {
  RealWindow window{};
  window.x = x, window.offset = offsets.data(), window.n_taps = static_cast<int64_t>(offsets.size());
  window.n = n, window.to = to;
  return window;
}

Tensor plan_windows(Planner& p, const Tensor& given, const Geometry& g, Reduction reduction,
                    const MeanOptions& options) {
  p.check(given.rank() == 4, "it takes images [N, C, H, W]");
  Tensor x = p.nearest_channels(given);
  int64_t batch = x.shape[0], channels = x.shape[1], height = x.shape[2], width = x.shape[3];
  int64_t rows = window_outputs(p, g, 0, height), columns = window_outputs(p, g, 1, width);
  Tensor to = p.make(Type::kF32, {batch, channels, rows, columns}, true);
  auto met = [&](int axis, int64_t size) {
    return static_cast<double>(std::min(g.kernel[axis], size / g.dilation[axis] + 1));
  };
  double work = static_cast<double>(to.count()) * met(0, height) * met(1, width);
  p.emit({x}, {to}, work, [=](const Memory& memory) {
    const RealTable& table = real_table();
    const float* from = memory.at(x);
    float* out = memory.at(to);
    parallel_ranges(batch * rows, 1, [&](int64_t first, int64_t last) {
      static thread_local std::vector<int64_t> offsets;
      for (int64_t row = first; row < last; ++row) {
        int64_t oy = row % rows, image = row / rows * height * width * channels;
        Taps y = taps_at(g, 0, height, oy);
        for (int64_t ox = 0; ox < columns; ++ox) {
          Taps at = taps_at(g, 1, width, ox);
          offsets.clear();
          for (int64_t i = y.begin; i < y.end; ++i) {
            for (int64_t j = at.begin; j < at.end; ++j) {
              int64_t pixel = (y.at + i * g.dilation[0]) * width + at.at + j * g.dilation[1];
              offsets.push_back(image + pixel * channels);
            }
          }
          float* result = out + (row * columns + ox) * channels;
          RealWindow window = unweighted(from, offsets, channels, result);
          if (reduction == Reduction::kMax) {
            table.window_max(window);
            continue;
          }
          table.window_sum(window);
          int64_t n = window.n_taps;
          if (options.count_padding)  // up to the end of the padded image
            n = (std::min(y.at + g.kernel[0], height + g.padding[0]) - y.at) *
                (std::min(at.at + g.kernel[1], width + g.padding[1]) - at.at);
          float divisor = static_cast<float>(options.divisor != 0 ? options.divisor : n);
          table.binary(RealOperation::kDiv, channels, result, 1, &divisor, 0, 1.0f, result);
        }
      }
    });
  });
  return to;
}

Value plan_pool_bits(Planner& p, const Layer& layer, const Tensor& given) {
  p.check(given.rank() == 4, "it takes words [N, H, W, words]");
  Tensor x = p.dense(given);
  Geometry g = pool_geometry(layer);
  int64_t batch = x.shape[0], height = x.shape[1], width = x.shape[2], words = x.shape[3];
  int64_t rows = window_outputs(p, g, 0, height), columns = window_outputs(p, g, 1, width);
  for (int axis = 0; axis < 2; ++axis)
    p.check(layer.padding[axis] == 0 || x.shape[1 + static_cast<size_t>(axis)] >= layer.dilation[axis],
            "windows may meet no pixel");
  const Stored* decreasing = layer.tensor("decreasing");
  p.check(!decreasing || decreasing->shape[0] == words, "decreasing does not fit the words");
  const uint32_t* flips = decreasing ? static_cast<const uint32_t*>(decreasing->data) : nullptr;
  Tensor to = p.make(Type::kI32, {batch, rows, columns, words});
  auto met = [&](int axis, int64_t size) {
    return static_cast<double>(std::min(g.kernel[axis], size / g.dilation[axis] + 1));
  };
  double work = static_cast<double>(to.count()) * met(0, height) * met(1, width);
  p.emit({x}, {to}, work, [=](const Memory& memory) {
    const uint32_t* from = memory.at<uint32_t>(x);
    uint32_t* out = memory.at<uint32_t>(to);
    parallel_ranges(batch * rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, columns * words)),
                    [&](int64_t first, int64_t last) {
                      for (int64_t row = first; row < last; ++row) {
                        const uint32_t* image = from + row / rows * height * width * words;
                        Taps y = taps_at(g, 0, height, row % rows);
                        for (int64_t ox = 0; ox < columns; ++ox) {
                          Taps at = taps_at(g, 1, width, ox);
                          uint32_t* result = out + (row * columns + ox) * words;
                          std::fill(result, result + words, 0xFFFFFFFFu);
                          for (int64_t i = y.begin; i < y.end; ++i) {
                            for (int64_t j = at.begin; j < at.end; ++j) {
                              const uint32_t* pixel =
                                  image +
                                  ((y.at + i * g.dilation[0]) * width + at.at + j * g.dilation[1]) * words;
                              for (int64_t v = 0; v < words; ++v)
                                result[v] &= flips ? pixel[v] ^ flips[v] : pixel[v];
                            }
                          }
                          for (int64_t v = 0; flips && v < words; ++v) result[v] ^= flips[v];
                        }
                      }
                    });
  });
  return Value::of(to);
}

// ------------------------------------------------------------------------------------------- operators

namespace {

Value avg_pool2d(Planner& p, const Step& s) {
  Geometry g{};
  g.kernel = p.pair(s.arguments[1], 1);
  bool strided = !p.integers(s.arguments[2]).empty();
  g.stride = strided ? p.pair(s.arguments[2], 1) : g.kernel;
  g.padding = p.pair(s.arguments[3], 0), g.dilation = {{1, 1}};
  for (int axis = 0; axis < 2; ++axis)
    p.check(2 * g.padding[axis] <= g.kernel[axis], "the padding is at most half the window");
  g.ceil_mode = p.truth(s.arguments[4]);
  MeanOptions options;
  options.count_padding = p.truth(s.arguments[5]);
  if (p.value(s.arguments[6]).kind != Value::Kind::kNull) {
    options.divisor = p.integer(s.arguments[6]);
    p.check(options.divisor != 0, "the divisor is 0");
  }
  return Value::of(plan_windows(p, p.real(s.arguments[0]), g, Reduction::kMean, options));
}

Value adaptive_avg_pool2d(Planner& p, const Step& s) {
  Tensor given = p.real(s.arguments[0]);
  p.check(given.rank() == 4, "it takes images [N, C, H, W]");
  Tensor x = p.nearest_channels(given);
  Pair outputs = p.pair(s.arguments[1], 1);
  int64_t batch = x.shape[0], channels = x.shape[1], height = x.shape[2], width = x.shape[3];
  p.check(height > 0 && width > 0, "an image has no pixels");
  Tensor to = p.make(Type::kF32, {batch, channels, outputs[0], outputs[1]}, true);
  double work = static_cast<double>(x.count()) + 4 * static_cast<double>(to.count());
  p.emit({x}, {to}, work, [=](const Memory& memory) {
    const RealTable& table = real_table();
    int64_t rows = outputs[0], columns = outputs[1];
    const float* from = memory.at(x);
    parallel_ranges(batch * rows, 1, [&](int64_t first, int64_t last) {
      static thread_local std::vector<int64_t> offsets;
      for (int64_t row = first; row < last; ++row) {
        int64_t i = row % rows, top = i * height / rows, bottom = ((i + 1) * height + rows - 1) / rows;
        for (int64_t j = 0; j < columns; ++j) {
          int64_t left = j * width / columns, right = ((j + 1) * width + columns - 1) / columns;
          offsets.clear();
          for (int64_t y = top; y < bottom; ++y) {
            for (int64_t column = left; column < right; ++column)
              offsets.push_back(((row / rows * height + y) * width + column) * channels);
          }
          float* result = memory.at(to) + (row * columns + j) * channels;
          RealWindow window = unweighted(from, offsets, channels, result);
          table.window_sum(window);
          float divisor = static_cast<float>(window.n_taps);
          table.binary(RealOperation::kDiv, channels, result, 1, &divisor, 0, 1.0f, result);
        }
      }
    });
  });
  return Value::of(to);
}

RealWeight weight_of(Planner& p, const Argument& argument) {
  RealWeight weight{};
  weight.tensor = p.dense(p.real(argument));
  weight.shape = weight.tensor.shape;
  p.check(weight.tensor.count() > 0, "its weight has no elements");
  return weight;
}

Value conv2d(Planner& p, const Step& s) {
  RealWeight weight = weight_of(p, s.arguments[1]);
  p.check(weight.shape.size() == 4, "its weight is not [O, C, kH, kW]");
  Geometry g{};
  g.kernel = {{weight.shape[2], weight.shape[3]}};
  g.stride = p.pair(s.arguments[3], 1), g.padding = p.pair(s.arguments[4], 0);
  g.dilation = p.pair(s.arguments[5], 1), g.groups = p.integer(s.arguments[6]);
  p.check(g.groups >= 1 && g.groups <= weight.shape[0], "there are more groups than outputs");
  bool has_bias = p.value(s.arguments[2]).kind != Value::Kind::kNull;
  Tensor bias = has_bias ? p.dense(p.real(s.arguments[2])) : Tensor{};
  return Value::of(plan_real_conv(p, p.real(s.arguments[0]), weight, has_bias ? &bias : nullptr, g));
}

Value linear(Planner& p, const Step& s) {
  RealWeight weight = weight_of(p, s.arguments[1]);
  p.check(weight.shape.size() == 2, "its weight is not [O, K]");
  bool has_bias = p.value(s.arguments[2]).kind != Value::Kind::kNull;
  Tensor bias = has_bias ? p.dense(p.real(s.arguments[2])) : Tensor{};
  return Value::of(plan_real_linear(p, p.real(s.arguments[0]), weight, has_bias ? &bias : nullptr));
}

}  // namespace

const std::vector<Operator>& window_operators() {
  static const std::vector<Operator> all = {
      {.name = "aten.conv2d.default",
       .arguments = {"input", "weight", "bias", "stride", "padding", "dilation", "groups"},
       .plan = conv2d},
      {.name = "aten.linear.default", .arguments = {"input", "weight", "bias"}, .plan = linear},
      {.name = "aten.avg_pool2d.default",
       .arguments = {"self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                     "divisor_override"},
       .plan = avg_pool2d},
      {.name = "aten.adaptive_avg_pool2d.default",
       .arguments = {"self", "output_size"},
       .plan = adaptive_avg_pool2d},
  };
  return all;
}

}  // namespace bop2nd::runtime

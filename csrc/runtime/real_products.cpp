// SPDX-License-Identifier: Apache-2.0
// Convolutions and dense layers of real numbers.
//
// Weights lie as [group][block of outputs][k][output], 0 behind the last output. A product is a list of
// pixels (where each starts) times a list of offsets (where its k-th number lies from there), so that images
// are read as they lie. Padding is written out once for every image, into memory of the arena.
#include <algorithm>
#include <cstring>
#include <optional>

#include "../core/bit_layout.h"
#include "../cpu/parallel.h"
#include "windows.h"

namespace bop2nd::runtime {
namespace {

constexpr int64_t kTilePixels = 96;  // a multiple of what any instruction set holds in registers

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Number k = (i * kW + j) * C + c of output o of a weight [O, C, kH, kW].
struct WeightReader {
  const float* reals;
  const uint32_t* words;
  int64_t channels, taps;

  float at(int64_t o, int64_t k) const {
    int64_t c = k % channels, tap = k / channels;
    if (reals) return reals[(o * channels + c) * taps + tap];
    int64_t word = (o * taps + tap) * words_for(channels) + BitLayout::word_of(c);
    return words[word] >> BitLayout::bit_of(c) & 1 ? -1.0f : 1.0f;
  }
};

struct Blocks {
  int64_t groups, outputs, n_k, block;  // outputs and numbers of a group

  int64_t n_blocks() const { return ceil_div(outputs, block); }
  size_t n_floats() const { return static_cast<size_t>(groups * n_blocks() * n_k * block); }

  void lay(const WeightReader& reader, float* to) const {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t b = 0; b < n_blocks(); ++b) {
        for (int64_t k = 0; k < n_k; ++k) {
          for (int64_t i = 0; i < block; ++i, ++to) {
            int64_t o = b * block + i;
            *to = o < outputs ? reader.at(g * outputs + o, k) : 0.0f;
          }
        }
      }
    }
  }
};

// The weight as the loops read it: prepared once where it is fixed, by an operation of the plan where it is
// computed.
struct PrepackedWeight {
  Tensor tensor;
  Kept kept;  // the memory of a fixed one
};

PrepackedWeight prepack_real(Planner& p, const RealWeight& weight, const Blocks& blocks) {
  int64_t channels = weight.shape[1], taps = weight.shape.size() == 4 ? weight.shape[2] * weight.shape[3] : 1;
  PrepackedWeight prepacked;
  p.check(blocks.n_floats() < (size_t{1} << 34), "its weight is too large");
  p.check(blocks.n_k <= kMaxSummands, "more than 2^24 numbers make one result");  // the plan lists them
  bool fixed = weight.words || weight.tensor.is_fixed();
  if (!fixed) {
    prepacked.tensor = p.make(Type::kF32, {static_cast<int64_t>(blocks.n_floats())});
    Tensor from = weight.tensor, to = prepacked.tensor;
    p.emit({from}, {to}, 0, [=](const Memory& memory) {
      blocks.lay({.reals = memory.at(from), .words = nullptr, .channels = channels, .taps = taps},
                 memory.at(to));
    });
    return prepacked;
  }
  const float* reals =
      weight.words ? nullptr : static_cast<const float*>(weight.tensor.place.fixed) + weight.tensor.offset;
  const void* source = weight.words ? static_cast<const void*>(weight.words) : reals;
  Prepared::Key key{source, {1, blocks.groups, blocks.outputs, blocks.n_k, blocks.block, channels, taps}};
  prepacked.kept = p.prepared().get(key, [&] {
    Words made(blocks.n_floats());
    blocks.lay({.reals = reals, .words = weight.words, .channels = channels, .taps = taps},
               reinterpret_cast<float*>(made.data()));
    return made;
  });
  prepacked.tensor.place.fixed = prepacked.kept.get();
  return prepacked;
}

struct RealTask {
  Blocks blocks;
  std::vector<int64_t> offsets;  // of the numbers of group 0
  int64_t group_step;            // to those of the next group
  int64_t all_outputs;
};

// Pixels [0, n) of one image: the start of each is place(pixel).
template <class PlaceOf>
void multiply_all(const RealTask& task, const float* bias, const float* x, const float* w, int64_t n,
                  float* to, const PlaceOf& place) {
  const RealTable& table = real_table();
  const Blocks& b = task.blocks;
  int64_t n_blocks = b.groups * b.n_blocks(), n_tiles = ceil_div(n, kTilePixels);
  bool serial = static_cast<double>(n) * static_cast<double>(b.n_k * b.outputs * b.groups) < 3e5;
  // With few tiles the blocks are shared out as well.
  int64_t parts = n_tiles >= 4 ? 1 : n_blocks;
  parallel_tasks(n_tiles * parts, serial, [&](int64_t i) {
    int64_t tile = i / parts, part = i % parts, first = tile * kTilePixels;
    int64_t pixels[kTilePixels], count = std::min(kTilePixels, n - first);
    for (int64_t k = 0; k < count; ++k) pixels[k] = place(first + k);
    for (int64_t block = part * n_blocks / parts; block < (part + 1) * n_blocks / parts; ++block) {
      int64_t g = block / b.n_blocks(), o = block % b.n_blocks() * b.block, output = g * b.outputs + o;
      RealTile t{.x = x + g * task.group_step,
                 .pixel = pixels,
                 .n_pixels = count,
                 .k_offset = task.offsets.data(),
                 .n_k = b.n_k,
                 .w = w + block * b.n_k * b.block,
                 .bias = bias ? bias + output : nullptr,
                 .n_outputs = std::min(b.block, b.outputs - o),
                 .to = to + first * task.all_outputs + output,
                 .to_stride = task.all_outputs};
      table.multiply(t);
    }
  });
}

std::vector<Tensor> reads_of(const Tensor& x, const PrepackedWeight& weight, const Tensor* bias) {
  std::vector<Tensor> reads{x, weight.tensor};
  if (bias) reads.push_back(*bias);
  return reads;
}

// One image with its border; planes or pixels lie side by side, as in x.
struct Bordered {
  Tensor x;
  int64_t channels, height, width, top, left;
  bool pixels;

  int64_t padded_height() const { return height + 2 * top; }
  int64_t padded_width() const { return width + 2 * left; }

  void write(const float* from, float* to) const {
    int64_t planes = pixels ? 1 : channels, depth = pixels ? channels : 1;
    int64_t line = padded_width() * depth, rows = padded_height();
    parallel_ranges(planes * rows, std::max<int64_t>(1, 32768 / line), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t plane = i / rows, y = i % rows - top;
        float* row = to + i * line;
        if (y < 0 || y >= height) {
          std::fill(row, row + line, 0.0f);
          continue;
        }
        std::fill(row, row + left * depth, 0.0f);
        std::fill(row + (left + width) * depth, row + line, 0.0f);
        const float* source = from + plane * x.strides[1] + y * x.strides[2];
        float* target = row + left * depth;
        for (int64_t column = 0; column < width; ++column, source += x.strides[3]) {
          for (int64_t c = 0; c < depth; ++c) *target++ = source[c * x.strides[1]];
        }
      }
    });
  }
};

Tensor plan_depthwise(Planner& p, const Tensor& given, const RealWeight& weight, const Tensor* bias,
                      const Geometry& g, Sizes out_shape) {
  Tensor x = p.nearest_channels(given), to = p.make(Type::kF32, std::move(out_shape), true);
  int64_t channels = x.shape[1], height = x.shape[2], width = x.shape[3];
  // [tap][channel]: one group of as many outputs.
  Blocks blocks{.groups = 1, .outputs = channels, .n_k = g.kernel[0] * g.kernel[1], .block = channels};
  PrepackedWeight prepacked = prepack_real(p, weight, blocks);
  int64_t batch = to.shape[0], rows = to.shape[2], columns = to.shape[3];
  std::optional<Tensor> added = bias ? std::optional<Tensor>(*bias) : std::nullopt;
  double work = static_cast<double>(to.count()) * static_cast<double>(blocks.n_k);
  p.emit(reads_of(x, prepacked, bias), {to}, work, [=](const Memory& memory) {
    const RealTable& table = real_table();
    const float *w = memory.at(prepacked.tensor), *from = memory.at(x),
                *terms = added ? memory.at(*added) : nullptr;
    parallel_ranges(batch * rows, 1, [&](int64_t first, int64_t last) {
      static thread_local std::vector<int64_t> offsets, w_offsets;
      for (int64_t row = first; row < last; ++row) {
        Taps y = taps_at(g, 0, height, row % rows);
        for (int64_t ox = 0; ox < columns; ++ox) {
          Taps at = taps_at(g, 1, width, ox);
          offsets.clear(), w_offsets.clear();
          for (int64_t i = y.begin; i < y.end; ++i) {
            for (int64_t j = at.begin; j < at.end; ++j) {
              int64_t line = row / rows * height + y.at + i * g.dilation[0];
              offsets.push_back((line * width + at.at + j * g.dilation[1]) * channels);
              w_offsets.push_back((i * g.kernel[1] + j) * channels);
            }
          }
          RealWindow window{.x = from,
                            .offset = offsets.data(),
                            .n_taps = static_cast<int64_t>(offsets.size()),
                            .n = channels,
                            .w = w,
                            .w_offset = w_offsets.data(),
                            .bias = terms,
                            .to = memory.at(to) + (row * columns + ox) * channels};
          table.window_products(window);
        }
      }
    });
  });
  return to;
}

}  // namespace

Tensor plan_real_conv(Planner& p, const Tensor& x, const RealWeight& weight, const Tensor* bias,
                      const Geometry& g) {
  p.check(x.rank() == 4, "it takes images [N, C, H, W]");
  int64_t outputs = weight.shape[0], depth = weight.shape[1], height = x.shape[2], width = x.shape[3];
  p.check(x.shape[1] == depth * g.groups && outputs % g.groups == 0, "the channels do not fit the weight");
  p.check(!bias || (bias->rank() == 1 && bias->shape[0] == outputs), "the bias does not fit the weight");
  for (int axis = 0; axis < 2; ++axis)
    p.check(x.shape[2 + static_cast<size_t>(axis)] + 2 * g.padding[axis] < (int64_t{1} << 31),
            "an image is too large");
  int64_t rows = window_outputs(p, g, 0, height), columns = window_outputs(p, g, 1, width);
  Sizes out_shape{x.shape[0], outputs, rows, columns};
  if (depth == 1 && g.groups == outputs && outputs > 1 && x.shape[0] > 0)
    return plan_depthwise(p, x, weight, bias, g, out_shape);
  Tensor to = p.make(Type::kF32, out_shape, true);
  Blocks blocks{.groups = g.groups,
                .outputs = outputs / g.groups,
                .n_k = depth * g.kernel[0] * g.kernel[1],
                .block = real_table().block};
  PrepackedWeight prepacked = prepack_real(p, weight, blocks);
  bool padded = g.padding[0] > 0 || g.padding[1] > 0;
  Bordered image{x, x.shape[1], height, width, g.padding[0], g.padding[1], x.strides[1] == 1};
  Sizes steps{x.strides[1], x.strides[2], x.strides[3]};  // of channel, row and column
  Tensor border;
  std::vector<Tensor> writes{to};
  if (padded) {
    border = p.make(Type::kF32, {image.channels, image.padded_height(), image.padded_width()});
    writes.push_back(border);
    int64_t line = image.padded_width();
    steps = image.pixels ? Sizes{1, line * image.channels, image.channels}
                         : Sizes{image.padded_height() * line, line, 1};
  }
  RealTask task{.blocks = blocks, .offsets = {}, .group_step = depth * steps[0], .all_outputs = outputs};
  for (int64_t i = 0; i < g.kernel[0]; ++i) {
    for (int64_t j = 0; j < g.kernel[1]; ++j) {
      for (int64_t c = 0; c < depth; ++c)
        task.offsets.push_back(i * g.dilation[0] * steps[1] + j * g.dilation[1] * steps[2] + c * steps[0]);
    }
  }
  double work = static_cast<double>(to.count()) * static_cast<double>(blocks.n_k);
  std::optional<Tensor> added = bias ? std::optional<Tensor>(*bias) : std::nullopt;
  p.emit(reads_of(x, prepacked, bias), writes, work, [=](const Memory& memory) {
    const float *w = memory.at(prepacked.tensor), *terms = added ? memory.at(*added) : nullptr;
    for (int64_t n = 0; n < to.shape[0]; ++n) {
      const float* source = memory.at(x) + n * x.strides[0];
      if (padded) image.write(source, memory.at(border)), source = memory.at(border);
      multiply_all(
          task, terms, source, w, rows * columns, memory.at(to) + n * to.strides[0], [&](int64_t pixel) {
            return pixel / columns * g.stride[0] * steps[1] + pixel % columns * g.stride[1] * steps[2];
          });
    }
  });
  return to;
}

Tensor plan_real_linear(Planner& p, const Tensor& given, const RealWeight& weight, const Tensor* bias) {
  int64_t outputs = weight.shape[0], n_k = weight.shape[1];
  p.check(given.rank() >= 1 && given.shape.back() == n_k, "the features do not fit the weight");
  p.check(!bias || (bias->rank() == 1 && bias->shape[0] == outputs), "the bias does not fit the weight");
  Tensor x = p.dense(given);
  Sizes shape = x.shape;
  shape.back() = outputs;
  Tensor to = p.make(Type::kF32, shape);
  Blocks blocks{.groups = 1, .outputs = outputs, .n_k = n_k, .block = real_table().block};
  PrepackedWeight prepacked = prepack_real(p, weight, blocks);
  RealTask task{.blocks = blocks, .offsets = {}, .group_step = 0, .all_outputs = outputs};
  for (int64_t k = 0; k < n_k; ++k) task.offsets.push_back(k);
  std::optional<Tensor> added = bias ? std::optional<Tensor>(*bias) : std::nullopt;
  int64_t rows = to.count() / outputs;
  p.emit(reads_of(x, prepacked, bias), {to}, static_cast<double>(to.count()) * static_cast<double>(n_k),
         [=](const Memory& memory) {
           const float *w = memory.at(prepacked.tensor), *terms = added ? memory.at(*added) : nullptr;
           multiply_all(task, terms, memory.at(x), w, rows, memory.at(to),
                        [&](int64_t row) { return row * n_k; });
         });
  return to;
}

}  // namespace bop2nd::runtime

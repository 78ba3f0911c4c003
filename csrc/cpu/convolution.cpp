// SPDX-License-Identifier: Apache-2.0
// Plans a binary convolution by counting bits: which pixels see which taps, and who computes them.
//
// Zero padding leaves taps out of the sum, so pixels are grouped into rectangles that see the same taps
// (interior, edges, corners) and every rectangle gets its own list of words: a border pixel costs less than
// an inner one and nothing is corrected afterwards. Padding with +1 or -1 copies the packed image into a
// padded one (1/32 of the real image); then all pixels are inner pixels.
#include <algorithm>

#include "../core/bit_layout.h"
#include "convolution.h"
#include "dispatch.h"
#include "../core/half_float.h"
#include "parallel.h"
#include "scratch.h"

namespace bop2nd {
namespace {

// Outputs 16 first .. 16 last - 1 of a group, whose weights share vectors.
struct WeightBlock {
  int64_t first, last;
  int lane_bits;
};

ScratchVector<WeightBlock> weight_blocks(int64_t outputs) {
  ScratchVector<WeightBlock> blocks;
  for (int64_t first = 0; 16 * first < outputs; first = blocks.back().last) {
    int lane_bits = lane_bits_for(outputs - 16 * first);
    blocks.push_back({.first = first, .last = first + 32 / lane_bits, .lane_bits = lane_bits});
  }
  return blocks;
}

// Word k of the outputs of one block, from all their rows. Dword 4 l + j of a slice holds bits of the 32 / L
// outputs at position j * 32 / L of those with (output % 16) / 4 == l.
template <int L>
void prepack_word(const uint32_t* rows, int64_t row_words, int64_t n_rows, uint32_t* slices) {
  constexpr int kParts = 32 / L;
  for (int dword = 0; dword < 16; ++dword) {
    uint32_t part[kParts] = {};
    for (int i = 0; i < kParts; ++i) {
      int position = dword % 4 * kParts + i;
      int64_t output = 16 * (position / 4) + 4 * (dword / 4) + position % 4;
      uint32_t word = output < n_rows ? rows[output * row_words] : 0;
      if (L < 32) word ^= (word << L) & (L == 8 ? 0xFF00FF00u : 0xFFFF0000u);  // pairs: weights_paired
      for (int slice = 0; slice < kParts; ++slice)
        part[slice] |= (word >> (slice * L) & (~0u >> (32 - L))) << (i * L);
    }
    for (int slice = 0; slice < kParts; ++slice) slices[16 * slice + dword] = part[slice];
  }
}

}  // namespace

void prepack_weight(const uint32_t* words, int64_t out_channels, int64_t groups, int64_t row_words,
                    uint32_t* blocked) {
  ScratchScope scope;
  int64_t per_group = out_channels / groups, group_words = (per_group + 15) / 16 * 16 * row_words;
  ScratchVector<WeightBlock> blocks = weight_blocks(per_group);
  int64_t n_blocks = static_cast<int64_t>(blocks.size());
  auto lay = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t g = i / n_blocks;
      const WeightBlock& block = blocks[static_cast<size_t>(i % n_blocks)];
      int64_t first = 16 * block.first, block_words = 16 * (block.last - block.first);
      const uint32_t* rows = words + (g * per_group + first) * row_words;
      uint32_t* to = blocked + g * group_words + first * row_words;
      auto prepack_word_of = block.lane_bits == 8    ? prepack_word<8>
                             : block.lane_bits == 16 ? prepack_word<16>
                                                     : prepack_word<32>;
      for (int64_t k = 0; k < row_words; ++k)
        prepack_word_of(rows + k, row_words, per_group - first, to + k * block_words);
    }
  };
  parallel_ranges(groups * n_blocks, std::max<int64_t>(1, 256 / std::max<int64_t>(1, row_words)), lay);
}

namespace {

constexpr int64_t kTilePixels = 64;
// Below this many products of a word with 16 outputs the work is not worth a second thread.
constexpr int64_t kSerialWork = 4096;

// Output positions first..last-1 of one axis see kernel positions tap_first..tap_last-1.
struct Interval {
  int64_t first, last, tap_first, tap_last;
};

ScratchVector<Interval> intervals(const ConvShape& s, int axis, bool padded) {
  ScratchVector<Interval> all;
  int64_t size = s.in_size(axis), d = s.dilation[axis];
  for (int64_t o = 0, n = s.out_size(axis); o < n; ++o) {
    int64_t at = o * s.stride[axis] - s.padding[axis];
    int64_t begin = at >= 0 ? 0 : (-at + d - 1) / d;
    int64_t end = at >= size ? 0 : (size - 1 - at) / d + 1;
    if (padded) begin = 0, end = s.kernel[axis];
    begin = std::min(begin, s.kernel[axis]);
    end = std::max(begin, std::min(end, s.kernel[axis]));
    if (!all.empty() && all.back().tap_first == begin && all.back().tap_last == end) {
      all.back().last = o + 1;
    } else {
      all.push_back({.first = o, .last = o + 1, .tap_first = begin, .tap_last = end});
    }
  }
  return all;
}

// A rectangle of output pixels with the same taps, in every image of the batch.
struct Rectangle {
  Interval rows, columns;
  ScratchVector<int32_t> run_offset;  // where runs of run_words words start, from the pixel's first word
  int64_t run_words;
  ScratchVector<int32_t> w_offset;
  bool w_contiguous;
  int64_t n_pixels;

  int64_t n_words() const { return static_cast<int64_t>(w_offset.size()); }
};

struct Image {  // of packed activations
  const uint32_t* words;
  int64_t height, width, pixel_words;
};

Rectangle rectangle(const ConvShape& s, const Image& image, const Interval& rows, const Interval& columns) {
  Rectangle r{.rows = rows,
              .columns = columns,
              .run_offset = {},
              .run_words = s.group_words(),
              .w_offset = {},
              .w_contiguous = true,
              .n_pixels = s.batch * (rows.last - rows.first) * (columns.last - columns.first)};
  int64_t words = s.group_words(), n_columns = columns.tap_last - columns.tap_first;
  bool joined = s.dilation[1] == 1 && s.groups == 1;  // the taps of a kernel row lie side by side
  if (joined) r.run_words *= n_columns;
  int64_t n_taps = (rows.tap_last - rows.tap_first) * n_columns;
  r.run_offset.reserve(static_cast<size_t>(n_taps));
  r.w_offset.reserve(static_cast<size_t>(n_taps * words));
  for (int64_t i = rows.tap_first; i < rows.tap_last; ++i) {
    for (int64_t j = columns.tap_first; j < columns.tap_last; ++j) {
      if (!joined || j == columns.tap_first) {
        int64_t x = (i * s.dilation[0] * image.width + j * s.dilation[1]) * image.pixel_words;
        r.run_offset.push_back(static_cast<int32_t>(x));
      }
      int32_t w = static_cast<int32_t>((i * s.kernel[1] + j) * words);
      if (w != static_cast<int32_t>(r.w_offset.size())) r.w_contiguous = false;
      for (int64_t k = 0; k < words; ++k, ++w) r.w_offset.push_back(w);
    }
  }
  return r;
}

// The image with its border written out. Bits that hold no channel stay 0.
ScratchVector<uint32_t> with_border(const ConvShape& s, const Image& from, int64_t height, int64_t width) {
  ScratchVector<uint32_t> pixel(static_cast<size_t>(from.pixel_words), 0);
  if (s.padding_value < 0) {
    BitLayout row{s.group_channels()};
    for (int64_t i = 0; i < from.pixel_words; ++i) {
      pixel[static_cast<size_t>(i)] = low_bits(row.elements_in(i % s.group_words()));
    }
  }
  int64_t line = width * from.pixel_words, image = height * line;
  ScratchVector<uint32_t> words(static_cast<size_t>(s.batch * image));
  parallel_ranges(
      s.batch * height, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, line)), [&](int64_t b, int64_t e) {
        for (int64_t r = b; r < e; ++r) {
          int64_t n = r / height, y = r - n * height - s.padding[0];
          uint32_t* to = words.data() + r * line;
          bool inside = y >= 0 && y < from.height;
          for (int64_t x = 0; x < width; ++x, to += from.pixel_words) {
            int64_t column = x - s.padding[1];
            const uint32_t* source = pixel.data();
            if (inside && column >= 0 && column < from.width) {
              source = from.words + ((n * from.height + y) * from.width + column) * from.pixel_words;
            }
            std::copy(source, source + from.pixel_words, to);
          }
        }
      });
  return words;
}

struct Plan {
  const ConvShape& shape;
  Image image;
  int64_t origin[2];  // input position of output pixel 0, tap 0
  ScratchVector<Rectangle> rectangles;
  ScratchVector<WeightBlock> blocks;  // of a group
};

struct Task {
  const Rectangle* rectangle;
  int64_t first_pixel, group, first_block, last_block;
};

// Every task is one tile of pixels times some blocks of one group; with several threads, tiles that hold much
// of the work (the interior of a small image) are cut into so many parts that some tasks a thread are left.
// Not more: each packs the tile's pixels again.
constexpr int64_t kTasksPerThread = 3;

ScratchVector<Task> tasks_of(const Plan& plan, int64_t* work) {
  int64_t group_work = 0;
  for (const Rectangle& r : plan.rectangles) group_work += r.n_pixels * r.n_words();
  int64_t blocks = static_cast<int64_t>(plan.blocks.size()), groups = plan.shape.groups;
  *work = group_work * plan.shape.group_blocks() * groups;
  int64_t n_threads = *work < kSerialWork ? 1 : n_threads_of(pool());
  ScratchVector<Task> tasks;
  for (const Rectangle& r : plan.rectangles) {
    int64_t tile_work = std::min(kTilePixels, r.n_pixels) * r.n_words(), parts = 1;
    if (n_threads > 1)
      parts = std::clamp<int64_t>(kTasksPerThread * n_threads * tile_work / (group_work * groups), 1, blocks);
    for (int64_t p = 0; p < r.n_pixels; p += kTilePixels) {
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t i = 0; i < parts; ++i) {
          tasks.push_back({.rectangle = &r,
                           .first_pixel = p,
                           .group = g,
                           .first_block = i * blocks / parts,
                           .last_block = (i + 1) * blocks / parts});
        }
      }
    }
  }
  return tasks;
}

// Memory of one task: what its pixels see, and its counts for one block. Each starts on a cache line.
struct Scratch {
  uint32_t *slices, *counts;

  Scratch(int64_t n_pixels, int64_t x_words) {
    static thread_local std::vector<uint32_t> memory;
    constexpr int64_t kWidest = 4;  // slices per word and 16 outputs per block, of 8-bit lanes
    counts = thread_memory(memory, static_cast<size_t>(kWidest * n_pixels * (x_words + 1 + 16) + 16));
    slices = counts + kWidest * 16 * n_pixels;
  }
};

// Where the pixels of a tile read and write.
struct Places {
  int64_t first_word[kTilePixels], out_pixel[kTilePixels];

  Places(const Plan& plan, const Task& task, int64_t n_pixels) {
    const ConvShape& s = plan.shape;
    const Rectangle& r = *task.rectangle;
    int64_t rows = r.rows.last - r.rows.first, columns = r.columns.last - r.columns.first;
    int64_t out_height = s.out_size(0), out_width = s.out_size(1);
    int64_t column = task.first_pixel % columns, line = task.first_pixel / columns;
    int64_t image = line / rows, row = line % rows, step = s.stride[1] * plan.image.pixel_words;
    for (int64_t p = 0; p < n_pixels; column = 0) {
      int64_t oy = r.rows.first + row, ox = r.columns.first + column;
      int64_t y = image * plan.image.height + oy * s.stride[0] + plan.origin[0];
      int64_t x = ox * s.stride[1] + plan.origin[1];
      int64_t word = (y * plan.image.width + x) * plan.image.pixel_words + task.group * s.group_words();
      int64_t out = (image * out_height + oy) * out_width + ox;
      for (int64_t stop = std::min(n_pixels, p + columns - column); p < stop; ++p, word += step, ++out)
        first_word[p] = word, out_pixel[p] = out;
      if (++row == rows) row = 0, ++image;
    }
  }
};

void run_task(const KernelTable& table, const Plan& plan, const Task& task, const uint32_t* blocked,
              const Epilogue& to) {
  const ConvShape& s = plan.shape;
  const Rectangle& r = *task.rectangle;
  int64_t n = std::min(kTilePixels, r.n_pixels - task.first_pixel), n_words = r.n_words();
  int64_t x_words = n_words + n_words % 2;  // whole pairs
  Scratch scratch(n, x_words);
  Places places(plan, task, n);
  PixelTile pixels{.image = plan.image.words,
                   .first_word = places.first_word,
                   .n_pixels = n,
                   .run_offset = r.run_offset.data(),
                   .n_runs = static_cast<int64_t>(r.run_offset.size()),
                   .run_words = r.run_words,
                   .x_words = x_words,
                   .lane_bits = 0,
                   .slices = scratch.slices};
  // Divisions take as long as counting some words: none in the loop.
  int64_t block_words = s.taps() * s.group_words() * 16, outputs = s.group_outputs();
  int64_t first_block = task.group * s.group_blocks(), first_output = task.group * outputs;
  int64_t n_taps = (r.rows.tap_last - r.rows.tap_first) * (r.columns.tap_last - r.columns.tap_first);
  int32_t bias = static_cast<int32_t>(n_taps * s.group_channels());
  for (int64_t i = task.first_block; i < task.last_block; ++i) {
    const WeightBlock& block = plan.blocks[static_cast<size_t>(i)];
    if (block.lane_bits != pixels.lane_bits) {
      pixels.lane_bits = block.lane_bits;
      table.pack_pixels(pixels);
    }
    const uint32_t* w = blocked + (first_block + block.first) * block_words;
    CountTile count{.x = scratch.slices,
                    .n_pixels = n,
                    .x_words = x_words,
                    .n_words = n_words,
                    .w = w,
                    .w_offset = r.w_offset.data(),
                    .w_contiguous = r.w_contiguous,
                    .lane_bits = block.lane_bits,
                    .counts = scratch.counts};
    int64_t n_outputs = std::min(16 * block.last, outputs) - 16 * block.first;
    MatmulTile tile{.counts = scratch.counts,
                    .n_pixels = n,
                    .bias = bias,
                    .out_pixel = places.out_pixel,
                    .first_output = first_output + 16 * block.first,
                    .all_outputs = s.out_channels,
                    .n_outputs = static_cast<int>(n_outputs)};
    table.multiply(count, tile, to);
  }
}

void counted_conv(const KernelTable& table, const ConvShape& s, const uint32_t* x, const uint32_t* blocked,
                  const Epilogue& to) {
  ScratchScope scope;
  bool padded = s.padding_value != 0 && (s.padding[0] > 0 || s.padding[1] > 0);
  Image image{.words = x, .height = s.height, .width = s.width, .pixel_words = s.groups * s.group_words()};
  Plan plan{.shape = s,
            .image = image,
            .origin = {-s.padding[0], -s.padding[1]},
            .rectangles = {},
            .blocks = weight_blocks(s.group_outputs())};
  ScratchVector<uint32_t> border;
  if (padded) {
    int64_t height = s.height + 2 * s.padding[0], width = s.width + 2 * s.padding[1];
    border = with_border(s, plan.image, height, width);
    plan.image.words = border.data(), plan.image.height = height, plan.image.width = width;
    plan.origin[0] = plan.origin[1] = 0;
  }
  const ScratchVector<Interval> of_columns = intervals(s, 1, padded);
  for (const Interval& rows : intervals(s, 0, padded)) {
    for (const Interval& columns : of_columns) {
      plan.rectangles.push_back(rectangle(s, plan.image, rows, columns));
    }
  }
  int64_t work;
  ScratchVector<Task> tasks = tasks_of(plan, &work);
  parallel_tasks(static_cast<int64_t>(tasks.size()), work < kSerialWork,
                 [&](int64_t i) { run_task(table, plan, tasks[static_cast<size_t>(i)], blocked, to); });
}

void conv(const KernelTable& table, const ConvShape& s, const uint32_t* x, const uint32_t* blocked,
          const Epilogue& to) {
  if (table.tiles && tiles_pay(s)) return tile_conv(*table.tiles, s, x, blocked, to);
  counted_conv(table, s, x, blocked, to);
}

// The epilogue of one element; sets its sign bit in words that were 0.
template <class T>
void finish_element(const Epilogue& to, int32_t dot, int64_t pixel, int64_t o, int64_t n_outputs) {
  int64_t at = pixel * n_outputs + o;
  float value = finish(to, dot, o, to.residual ? to_float(static_cast<const T*>(to.residual)[at]) : 0.0f);
  if (to.values) static_cast<T*>(to.values)[at] = from_float<T>(value);
  uint32_t bit = is_negative(to, dot, value, o) ? 1u << BitLayout::bit_of(o) : 0;
  to.signs[pixel * words_for(n_outputs) + BitLayout::word_of(o)] |= bit;
}

// Sign words where groups do not end on a block of 16 outputs: by way of the dots.
template <class T>
void conv_signs_across_groups(const KernelTable& table, const ConvShape& s, const uint32_t* x,
                              const uint32_t* blocked, const Epilogue& to) {
  ScratchScope scope;
  int64_t n_pixels = s.out_pixels(), n = s.out_channels;
  ScratchVector<float> dots(static_cast<size_t>(n_pixels * n));
  Epilogue plain;
  plain.values = dots.data();
  conv(table, s, x, blocked, plain);
  parallel_ranges(n_pixels, std::max<int64_t>(1, 1024 / words_for(n)), [&](int64_t begin, int64_t end) {
    std::fill(to.signs + begin * words_for(n), to.signs + end * words_for(n), 0u);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t o = 0; o < n; ++o) {
        int32_t dot = static_cast<int32_t>(dots[static_cast<size_t>(p * n + o)]);
        finish_element<T>(to, dot, p, o, n);
      }
    }
  });
}

}  // namespace

void binary_conv(const ConvShape& s, const uint32_t* x, const uint32_t* blocked, const Epilogue& to) {
  const KernelTable& table = active_table();
  if (!to.signs || s.groups == 1 || s.group_outputs() % 16 == 0) return conv(table, s, x, blocked, to);
  switch (to.dtype) {
    case Dtype::kBFloat16:
      return conv_signs_across_groups<BFloat16>(table, s, x, blocked, to);
    case Dtype::kFloat16:
      return conv_signs_across_groups<Float16>(table, s, x, blocked, to);
    default:
      return conv_signs_across_groups<float>(table, s, x, blocked, to);
  }
}

}  // namespace bop2nd

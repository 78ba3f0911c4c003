// SPDX-License-Identifier: Apache-2.0
// gradient[pixel][c] = sum over taps and outputs of grad[output pixel][o] * sign of the weight. Rows of the
// real matrix are outputs, its lanes are neighbouring output pixels: all taps share its tables, and what they
// sum is added to the input pixels that they see.
//
// Output pixels lie in one line, `pitch` from row to row, input pixels as well, the distances between the
// rows being so wide that sums that leave the image land between the rows. With a stride, input pixels are
// taken apart into phases, each a plane of its own in which a tap is a mere shift again. Phases that no tap
// looks at have no plane, and taps that look at no pixel no shift: planes are as large as the image and the
// output.
#include <algorithm>
#include <cstring>

#include "convolution.h"
#include "dispatch.h"
#include "gradient.h"
#include "parallel.h"

namespace bop2nd {
namespace {

using namespace gradient;

// A thread's planes are kept near this size, so that they stay in the second-level cache.
constexpr int64_t kPlaneBytes = 1 << 20;
// A convolution that looks at one pixel at a time is cut into pieces of so many.
constexpr int64_t kPiece = 256;

// Where one tap's sums go.
struct Shift {
  int64_t tap, phase, offset;
};

// Where a kernel position moves outputs along one axis: output y belongs to position y + shift of a phase.
struct Move {
  int64_t position, phase, shift;
};

struct AxisPlan {
  std::vector<Move> moves;        // of the kernel positions that see a pixel
  std::vector<int64_t> phase_of;  // [min(stride, size)]: number of the phase, -1 where nothing looks
  int64_t n_phases = 0;
  int64_t before = 0, after = 0;  // how far sums reach beyond the image
  int64_t size;                   // of a phase

  AxisPlan(const ConvShape& s, int axis) : size(ceil_div(s.in_size(axis), s.stride[axis])) {
    int64_t stride = s.stride[axis], in_size = s.in_size(axis), out_size = s.out_size(axis);
    phase_of.assign(static_cast<size_t>(std::min(stride, in_size)), -1);
    for (int64_t i = 0; i < s.kernel[axis]; ++i) {
      int64_t at = i * s.dilation[axis] - s.padding[axis];
      int64_t shift = at >= 0 ? at / stride : -ceil_div(-at, stride), phase = at - shift * stride;
      if (phase >= in_size) continue;
      int64_t first = std::max<int64_t>(0, -shift);
      if (first > std::min(out_size - 1, (in_size - 1 - phase) / stride - shift)) continue;
      int64_t& number = phase_of[static_cast<size_t>(phase)];
      if (number < 0) number = n_phases++;
      moves.push_back({.position = i, .phase = number, .shift = shift});
    }
    if (moves.empty()) return;
    before = std::max<int64_t>(0, -moves.front().shift);
    after = std::max<int64_t>(0, out_size + moves.back().shift - size);
  }
};

struct InputPlan {
  ConvShape s;
  AxisPlan rows, columns;
  int64_t pitch, first, plane;  // `first`: of pixel (0, 0) in a plane; `plane`: its length
  std::vector<Shift> shifts;
  std::vector<uint32_t> signs;  // [group][chunk of outputs][tap][channel]: bits of 32 outputs
  int64_t output_chunks;

  int64_t phases() const { return rows.n_phases * columns.n_phases; }
  // Number of the plane that pixels y, x of these remainders lie in, -1 for none.
  int64_t plane_of(int64_t y, int64_t x) const {
    int64_t row = rows.phase_of[static_cast<size_t>(y)], column = columns.phase_of[static_cast<size_t>(x)];
    return row < 0 || column < 0 ? -1 : row * columns.n_phases + column;
  }
  int64_t tap_signs() const { return s.group_words() * kWordBits; }
  int64_t chunk_signs() const { return s.taps() * tap_signs(); }
  const uint32_t* group_signs(int64_t group) const {
    return signs.data() + group * output_chunks * chunk_signs();
  }
};

InputPlan input_plan(const ConvShape& s, int lanes) {
  InputPlan plan{.s = s,
                 .rows = {s, 0},
                 .columns = {s, 1},
                 .pitch = 0,
                 .first = 0,
                 .plane = 0,
                 .shifts = {},
                 .signs = {},
                 .output_chunks = ceil_div(s.group_outputs(), kWordBits)};
  const AxisPlan &rows = plan.rows, &columns = plan.columns;
  plan.pitch = std::max(columns.size + std::max(columns.before, columns.after), s.out_size(1));
  plan.first = rows.before * plan.pitch + columns.before;
  int64_t n_rows = rows.before + std::max(rows.size + rows.after, s.out_size(0)) + 1;
  // Not a power of two apart: planes would fall into the same sets of a cache.
  plan.plane = round_up(n_rows * plan.pitch + columns.before + columns.after + 2 * lanes, 32) + 16;
  for (const Move& y : rows.moves) {
    for (const Move& x : columns.moves)
      plan.shifts.push_back({.tap = y.position * s.kernel[1] + x.position,
                             .phase = y.phase * columns.n_phases + x.phase,
                             .offset = y.shift * plan.pitch + x.shift});
  }
  // Of the sums that a pixel receives, those of earlier output pixels come first.
  std::stable_sort(plan.shifts.begin(), plan.shifts.end(),
                   [](const Shift& a, const Shift& b) { return a.offset > b.offset; });
  return plan;
}

// Bits of 32 outputs side by side, for every channel.
void transpose_weights(const SumTable& table, const uint32_t* w, InputPlan& plan) {
  const ConvShape& s = plan.s;
  plan.signs.resize(static_cast<size_t>(s.groups * plan.output_chunks * plan.chunk_signs()));
  int64_t row_words = s.taps() * s.group_words();
  std::vector<uint32_t> nothing(static_cast<size_t>(s.group_words()), 0);
  parallel_ranges(s.groups * plan.output_chunks * s.taps(), ceil_div(256, s.group_words()),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      int64_t tap = i % s.taps(), chunk = i / s.taps() % plan.output_chunks;
                      int64_t group = i / s.taps() / plan.output_chunks, first = chunk * kWordBits;
                      const uint32_t* rows[kWordBits];
                      for (int64_t o = 0; o < kWordBits; ++o) {
                        bool there = first + o < s.group_outputs();
                        int64_t row = group * s.group_outputs() + first + o;
                        rows[o] = there ? w + row * row_words + tap * s.group_words() : nothing.data();
                      }
                      table.transpose_bits(rows, s.group_words(), plan.signs.data() + i * plan.tap_signs());
                    }
                  });
}

struct Image {
  int64_t first_output, first_input;  // pixels
  int64_t height, width, out_height, out_width;
};

struct InputTask {
  Image image;
  int64_t group;
  Channels channels;
};

// Sums of one image, into planes[phase][c].
void sum_planes(const SumTable& table, const InputPlan& plan, const InputTask& task, Dtype dtype,
                const void* grad, float* rows, float* reals, float* sums, float* planes) {
  const ConvShape& s = plan.s;
  const Image& image = task.image;
  int64_t n = task.channels.n, width = plan.output_chunks * kWordBits, n_lanes = table.lanes;
  int64_t first_output = task.group * s.group_outputs();
  int64_t end = (image.out_height - 1) * plan.pitch + image.out_width;
  std::fill(planes, planes + plan.phases() * n * plan.plane, 0.0f);
  std::fill(rows, rows + n_lanes * width, 0.0f);
  for (int64_t first = 0, row = 0, column = 0; first < end; first += n_lanes) {
    for (int64_t lane = 0; lane < n_lanes; ++lane) {
      float* to = rows + lane * width;
      if (row < image.out_height && column < image.out_width) {
        int64_t pixel = image.first_output + row * image.out_width + column;
        table.load_reals(dtype, element(dtype, grad, pixel * s.out_channels + first_output),
                         s.group_outputs(), to);
      } else {
        std::fill(to, to + s.group_outputs(), 0.0f);
      }
      if (++column == plan.pitch) column = 0, ++row;
    }
    table.transpose(rows, width, n_lanes, width, reals, n_lanes);
    const uint32_t* signs = plan.group_signs(task.group) + task.channels.first;
    table.signed_sums({.a = reals,
                       .a_stride = n_lanes,
                       .n_chunks = plan.output_chunks,
                       .signs = signs,
                       .chunk_stride = plan.chunk_signs(),
                       .n_segments = s.taps(),
                       .segment_stride = plan.tap_signs(),
                       .n = n,
                       .sums = sums,
                       .fresh = true,
                       .last_rows = s.group_outputs() - (plan.output_chunks - 1) * kWordBits});
    for (const Shift& shift : plan.shifts)
      table.add_sums(sums + shift.tap * n * n_lanes, n,
                     planes + shift.phase * n * plan.plane + plan.first + first + shift.offset, plan.plane);
  }
}

void run_input_task(const SumTable& table, const InputPlan& plan, const InputTask& task, Dtype dtype,
                    const void* grad, const uint32_t* mask, void* to) {
  const ConvShape& s = plan.s;
  const Image& image = task.image;
  const Channels& channels = task.channels;
  constexpr int64_t kPixels = 16;
  int64_t block_size = table.lanes * plan.output_chunks * kWordBits;
  int64_t sum_size = s.taps() * channels.n * table.lanes;
  int64_t plane_size = plan.phases() * channels.n * plan.plane, line_size = kPixels * channels.n;
  Arena arena{block_size, block_size, sum_size, plane_size, line_size};
  float *rows = arena.take(block_size), *reals = arena.take(block_size), *sums = arena.take(sum_size);
  float *planes = arena.take(plane_size), *line = arena.take(line_size);
  sum_planes(table, plan, task, dtype, grad, rows, reals, sums, planes);
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t phase_x = 0; phase_x < std::min(s.stride[1], image.width); ++phase_x) {
      int64_t plane = plan.plane_of(y % s.stride[0], phase_x);
      const float* from =
          planes + plane * channels.n * plan.plane + plan.first + y / s.stride[0] * plan.pitch;
      if (plane < 0) std::fill(line, line + line_size, 0.0f);
      for (int64_t first = 0, n; first * s.stride[1] + phase_x < image.width; first += n) {
        n = std::min(kPixels, ceil_div(image.width - phase_x, s.stride[1]) - first);
        if (plane >= 0) table.transpose(from + first, plan.plane, channels.n, n, line, channels.n);
        for (int64_t p = 0; p < n; ++p) {
          int64_t x = (first + p) * s.stride[1] + phase_x;
          int64_t pixel = image.first_input + y * image.width + x;
          const char* at =
              element(dtype, to, pixel * s.channels + task.group * s.group_channels() + channels.first);
          const uint32_t* inside = mask ? mask + pixel * s.groups * s.group_words() +
                                              task.group * s.group_words() + channels.first_word
                                        : nullptr;
          table.store_reals(line + p * channels.n, channels.n, inside, dtype, const_cast<char*>(at));
        }
      }
    }
  }
}

std::vector<Image> images_of(const ConvShape& s) {
  std::vector<Image> images;
  int64_t n_pixels = s.height * s.width, n_outputs = s.out_size(0) * s.out_size(1);
  if (s.pointwise()) {
    for (int64_t first = 0, all = s.batch * n_pixels; first < all; first += kPiece) {
      int64_t n = std::min(kPiece, all - first);
      images.push_back({.first_output = first,
                        .first_input = first,
                        .height = 1,
                        .width = n,
                        .out_height = 1,
                        .out_width = n});
    }
    return images;
  }
  for (int64_t i = 0; i < s.batch; ++i)
    images.push_back({.first_output = i * n_outputs,
                      .first_input = i * n_pixels,
                      .height = s.height,
                      .width = s.width,
                      .out_height = s.out_size(0),
                      .out_width = s.out_size(1)});
  return images;
}

void depthwise_input_gradient(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* w,
                              const uint32_t* mask, void* to) {
  const TrainingTable& training = *training_of(bop2nd_isa_active());
  std::vector<uint32_t> signs(static_cast<size_t>(s.taps() * s.channels));
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t tap = 0; tap < s.taps(); ++tap)
      signs[static_cast<size_t>(tap * s.channels + c)] = w[c * s.taps() + tap];
  }
  int64_t line_products = std::max<int64_t>(1, s.products() / (s.batch * s.height));
  parallel_ranges(
      s.batch * s.height, ceil_div(kSerialProducts, line_products), [&](int64_t begin, int64_t end) {
        std::vector<int64_t> seen(static_cast<size_t>(2 * s.taps()));
        training.depthwise_inputs(s, dtype, grad, signs.data(), mask, to, seen.data(), begin, end);
      });
}

}  // namespace

void conv_input_gradient(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* w,
                         const uint32_t* mask, void* to) {
  const SumTable& table = *active_table().sums;
  if (s.batch * s.height * s.width * s.channels == 0) return;
  if (s.products() == 0) {
    std::memset(to, 0, static_cast<size_t>(s.batch * s.height * s.width * s.channels * size_of(dtype)));
    return;
  }
  if (s.depthwise()) return depthwise_input_gradient(s, dtype, grad, w, mask, to);
  std::vector<Image> images = images_of(s);
  ConvShape planned = s;
  if (s.pointwise()) planned.height = 1, planned.width = images[0].width;
  InputPlan plan = input_plan(planned, table.lanes);
  transpose_weights(table, w, plan);
  // As many channels as stay in the cache; fewer where threads would be left without a task.
  int64_t words = s.group_words(), wanted = wanted_tasks(s);
  auto n_tasks = [&] {
    return static_cast<int64_t>(images.size()) * s.groups * ceil_div(s.group_words(), words);
  };
  while (words > 1 &&
         (4 * words * kWordBits * s.taps() * table.lanes > kSumBytes ||
          4 * words * kWordBits * plan.phases() * plan.plane > kPlaneBytes || n_tasks() < wanted))
    words = ceil_div(words, 2);
  std::vector<InputTask> tasks;
  for (const Image& image : images) {
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t word = 0; word < s.group_words(); word += words)
        tasks.push_back({.image = image, .group = g, .channels = Channels(s, word, words)});
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), wanted == 1, [&](int64_t i) {
    run_input_task(table, plan, tasks[static_cast<size_t>(i)], dtype, grad, mask, to);
  });
}

}  // namespace bop2nd

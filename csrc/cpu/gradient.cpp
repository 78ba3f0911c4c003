// SPDX-License-Identifier: Apache-2.0
// Gradients of a binary convolution: products of the real gradient of its outputs with the signs of its
// weights or of its input, as sums of 32 (signed_sums.inl). No sign is ever unpacked.
//
// A sum's order depends on the shape alone, not on the tasks that the work is cut into, nor on the lanes of
// an instruction set: gradients are the same bits on any number of threads and any processor.
#include <algorithm>
#include <cstring>

#include "../core/bit_layout.h"
#include "convolution.h"
#include "dispatch.h"
#include "parallel.h"

namespace bop2nd {
namespace {

// A thread's memory is kept near these sizes, so that it stays in the second-level cache.
constexpr int64_t kSumBytes = 1 << 17, kPlaneBytes = 1 << 20;
constexpr int64_t kTasksPerThread = 3;
// Below this many multiply-accumulates the work is not worth a second thread.
constexpr int64_t kSerialProducts = 1 << 20;
// A convolution that looks at one pixel at a time is cut into pieces of so many.
constexpr int64_t kPiece = 256;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t wanted_tasks(const ConvShape& s) {
  return s.products() < kSerialProducts ? 1 : kTasksPerThread * pool().n_threads();
}

// Parts of one memory of a thread, each on a cache line.
class Arena {
 public:
  explicit Arena(std::initializer_list<int64_t> sizes) {
    static thread_local std::vector<float> memory;
    int64_t total = 0;
    for (int64_t n : sizes) total += round_up(n, kLine);
    next_ = thread_memory(memory, static_cast<size_t>(total));
  }
  float* take(int64_t n) {
    float* part = next_;
    next_ += round_up(n, kLine);
    return part;
  }

 private:
  static constexpr int64_t kLine = 16;
  float* next_;
};

// Channels of a group from a word on.
struct Channels {
  int64_t first_word, n_words, first, n;

  Channels(const ConvShape& s, int64_t first_word, int64_t n_words)
      : first_word(first_word),
        n_words(std::min(n_words, s.group_words() - first_word)),
        first(first_word * kWordBits),
        n(std::min(this->n_words * kWordBits, s.group_channels() - first)) {}
};

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

const char* element(Dtype dtype, const void* base, int64_t i) {
  return static_cast<const char*>(base) + i * size_of(dtype);
}

// --------------------------------------------------------------------------------- of the weights
// gradient[o][tap][c] = sum over output pixels of grad[pixel][o] * sign of the input there. Rows of the real
// matrix are pixels, its lanes are outputs; the signs that one tap sees of 32 pixels are transposed.

constexpr int64_t kPixelChunks = 4;  // read at a time

struct WeightTask {
  int64_t group, first_tap, last_tap;
  Channels channels;
  int64_t first_output, last_output;  // of the group
};

// What 32 output pixels see: the words of their inputs, for one tap after the other.
class Sight {
 public:
  Sight(const ConvShape& s, const uint32_t* x, int64_t group, const Channels& channels)
      : s_(s),
        x_(x + group * s.group_words() + channels.first_word),
        padding_(static_cast<size_t>(channels.n_words), s.padding_value < 0 ? ~0u : 0u) {}

  void look_at(int64_t first_pixel, int n) {
    int64_t width = s_.out_size(1), height = s_.out_size(0);
    int64_t column = first_pixel % width, line = first_pixel / width;
    int64_t row = line % height, image = line / height;
    n_ = n;
    for (int i = 0; i < n; ++i) {
      y_[i] = row * s_.stride[0] - s_.padding[0], x_at_[i] = column * s_.stride[1] - s_.padding[1];
      line_[i] = image * s_.height;
      if (++column == width) column = 0, ++row;
      if (row == height) row = 0, ++image;
    }
  }
  // Rows for transpose_bits; returns which pixels see padding.
  uint32_t rows(int64_t tap, const uint32_t** rows) const {
    int64_t dy = tap / s_.kernel[1] * s_.dilation[0], dx = tap % s_.kernel[1] * s_.dilation[1];
    int64_t pixel_words = s_.groups * s_.group_words();
    uint32_t outside = 0;
    for (int i = 0; i < kWordBits; ++i) {
      rows[i] = padding_.data();
      if (i >= n_) continue;
      int64_t y = y_[i] + dy, x = x_at_[i] + dx;
      if (y >= 0 && y < s_.height && x >= 0 && x < s_.width) {
        rows[i] = x_ + ((line_[i] + y) * s_.width + x) * pixel_words;
      } else {
        outside |= 1u << i;
      }
    }
    return outside;
  }

 private:
  const ConvShape& s_;
  const uint32_t* x_;
  std::vector<uint32_t> padding_;
  int n_ = 0;
  int64_t y_[kWordBits], x_at_[kWordBits], line_[kWordBits];
};

void run_weight_task(const SumTable& table, const ConvShape& s, const WeightTask& task, Dtype dtype,
                     const void* grad, const uint32_t* x, float* to) {
  int64_t n_pixels = s.batch * s.out_size(0) * s.out_size(1), n_taps = task.last_tap - task.first_tap;
  const Channels& channels = task.channels;
  int64_t n_outputs = task.last_output - task.first_output, width = round_up(n_outputs, table.lanes);
  int64_t n_sums = n_taps * channels.n, chunk_signs = n_sums + kWordBits;
  int64_t real_size = kPixelChunks * kWordBits * width;
  Arena arena{real_size, n_sums * width, n_taps * width};
  static thread_local std::vector<uint32_t> sign_memory;
  uint32_t* signs = thread_memory(sign_memory, static_cast<size_t>(kPixelChunks * chunk_signs));
  float* reals = arena.take(real_size);
  float* sums = arena.take(n_sums * width);
  float* padded = arena.take(n_taps * width);  // sums over the pixels for which a tap lies in zero padding
  std::fill(padded, padded + n_taps * width, 0.0f);
  std::fill(reals, reals + real_size, 0.0f);
  Sight sight(s, x, task.group, channels);
  int64_t first_output = task.group * s.group_outputs() + task.first_output;
  for (int64_t first = 0; first < n_pixels; first += kPixelChunks * kWordBits) {
    int64_t n = std::min(kPixelChunks * kWordBits, n_pixels - first), n_chunks = ceil_div(n, kWordBits);
    for (int64_t p = 0; p < n; ++p)
      table.load_reals(dtype, element(dtype, grad, (first + p) * s.out_channels + first_output), n_outputs,
                       reals + p * width);
    std::fill(reals + n * width, reals + n_chunks * kWordBits * width, 0.0f);
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
      int64_t pixel = chunk * kWordBits;
      sight.look_at(first + pixel, static_cast<int>(std::min<int64_t>(kWordBits, n - pixel)));
      for (int64_t tap = 0; tap < n_taps; ++tap) {
        const uint32_t* rows[kWordBits];
        uint32_t outside = sight.rows(task.first_tap + tap, rows);
        table.transpose_bits(rows, channels.n_words, signs + chunk * chunk_signs + tap * channels.n);
        if (s.padding_value != 0) continue;
        for (; outside != 0; outside &= outside - 1) {
          const float* row = reals + (pixel + __builtin_ctz(outside)) * width;
          for (int64_t o = 0; o < width; ++o) padded[tap * width + o] += row[o];
        }
      }
    }
    for (int64_t o = 0; o < width; o += table.lanes) {
      table.signed_sums(
          {reals + o, width, n_chunks, signs, chunk_signs, 1, 0, n_sums, sums + n_sums * o, first == 0});
      int64_t next = first + kPixelChunks * kWordBits,
              last = std::min(next + kPixelChunks * kWordBits, n_pixels);
      for (int64_t p = next; p < last; ++p)
        __builtin_prefetch(element(dtype, grad, p * s.out_channels + first_output + o), 0, 2);
    }
  }
  for (int64_t block = 0; block < width; block += table.lanes) {
    int64_t n = std::min<int64_t>(table.lanes, n_outputs - block), out_row = s.taps() * s.group_channels();
    for (int64_t tap = 0; tap < n_taps; ++tap) {
      float* sum = sums + n_sums * block + tap * channels.n * table.lanes;
      for (int64_t c = 0; c < channels.n; ++c) {
        for (int64_t o = 0; o < n; ++o) sum[c * table.lanes + o] -= padded[tap * width + block + o];
      }
      table.transpose(sum, table.lanes, channels.n, n,
                      to + (first_output + block) * out_row + (task.first_tap + tap) * s.group_channels() +
                          channels.first,
                      out_row);
    }
  }
}

// ------------------------------------------------------------------------------------ of the input
// gradient[pixel][c] = sum over taps and outputs of grad[output pixel][o] * sign of the weight. Rows of the
// real matrix are outputs, its lanes are neighbouring output pixels: all taps share its tables, and what they
// sum is added to the input pixels that they see.
//
// Output pixels lie in one line, `pitch` from row to row, input pixels as well, the distances between the
// rows being so wide that what falls beside the image meets no pixel of it. With a stride, input pixels are
// taken apart into phases, each a plane of its own in which a tap is a mere shift again. Phases that no tap
// looks at have no plane, and taps that look at no pixel no shift: planes are as large as the image and the
// output.

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
      moves.push_back({i, number, shift});
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
  InputPlan plan{s, {s, 0}, {s, 1}, 0, 0, 0, {}, {}, ceil_div(s.group_outputs(), kWordBits)};
  const AxisPlan &rows = plan.rows, &columns = plan.columns;
  plan.pitch = std::max(columns.size + std::max(columns.before, columns.after), s.out_size(1));
  plan.first = rows.before * plan.pitch + columns.before;
  int64_t n_rows = rows.before + std::max(rows.size + rows.after, s.out_size(0)) + 1;
  // Not a power of two apart: planes would fall into the same sets of a cache.
  plan.plane = round_up(n_rows * plan.pitch + columns.before + columns.after + 2 * lanes, 32) + 16;
  for (const Move& y : rows.moves) {
    for (const Move& x : columns.moves)
      plan.shifts.push_back({y.position * s.kernel[1] + x.position, y.phase * columns.n_phases + x.phase,
                             y.shift * plan.pitch + x.shift});
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
    table.signed_sums({reals, n_lanes, plan.output_chunks, signs, plan.chunk_signs(), s.taps(),
                       plan.tap_signs(), n, sums, true});
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
      images.push_back({first, first, 1, n, 1, n});
    }
    return images;
  }
  for (int64_t i = 0; i < s.batch; ++i)
    images.push_back({i * n_outputs, i * n_pixels, s.height, s.width, s.out_size(0), s.out_size(1)});
  return images;
}

// --------------------------------------------------------------------------- depthwise convolutions

void depthwise_weight_gradient(const SumTable& table, const ConvShape& s, Dtype dtype, const void* grad,
                               const uint32_t* x, float* to) {
  int64_t width = table.lanes;
  parallel_tasks(ceil_div(s.channels, width), wanted_tasks(s) == 1, [&](int64_t i) {
    int64_t first = i * width, n = std::min(width, s.channels - first);
    Arena arena{s.taps() * width};
    float* sums = arena.take(s.taps() * width);
    table.depthwise_weights(s, dtype, grad, x, first, static_cast<int>(n), sums);
    table.transpose(sums, width, s.taps(), n, to + first * s.taps(), s.taps());
  });
}

void depthwise_input_gradient(const SumTable& table, const ConvShape& s, Dtype dtype, const void* grad,
                              const uint32_t* w, const uint32_t* mask, void* to) {
  std::vector<uint32_t> signs(static_cast<size_t>(s.taps() * s.channels));
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t tap = 0; tap < s.taps(); ++tap)
      signs[static_cast<size_t>(tap * s.channels + c)] = w[c * s.taps() + tap];
  }
  int64_t line_products = std::max<int64_t>(1, s.products() / (s.batch * s.height));
  parallel_ranges(s.batch * s.height, ceil_div(kSerialProducts, line_products),
                  [&](int64_t begin, int64_t end) {
                    std::vector<int64_t> seen(static_cast<size_t>(2 * s.taps()));
                    table.depthwise_inputs(s, dtype, grad, signs.data(), mask, to, seen.data(), begin, end);
                  });
}

}  // namespace

void conv_weight_gradient(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* x, float* to) {
  const SumTable& table = *count_call().sums;
  if (s.products() == 0) {
    std::fill(to, to + s.out_channels * s.taps() * s.group_channels(), 0.0f);
    return;
  }
  if (s.depthwise()) return depthwise_weight_gradient(table, s, dtype, grad, x, to);
  // As many sums as stay in the cache, but some tasks for each thread: first with fewer outputs, then with
  // fewer taps, as both have the same signs transposed again.
  int64_t taps = s.taps(), words = s.group_words(), outputs = std::min<int64_t>(128, s.group_outputs());
  auto sum_bytes = [&] { return 4 * taps * words * kWordBits * outputs; };
  auto n_tasks = [&] {
    return s.groups * ceil_div(s.taps(), taps) * ceil_div(s.group_words(), words) *
           ceil_div(s.group_outputs(), outputs);
  };
  while (sum_bytes() > 2 * kSumBytes && taps > 1) taps = ceil_div(taps, 2);
  while (sum_bytes() > 2 * kSumBytes && words > 1) words = ceil_div(words, 2);
  int64_t wanted = wanted_tasks(s);
  while (n_tasks() < wanted && outputs > 2 * table.lanes)
    outputs = round_up(ceil_div(outputs, 2), table.lanes);
  while (n_tasks() < wanted && taps > 1) taps = ceil_div(taps, 2);
  while (n_tasks() < wanted && words > 1) words = ceil_div(words, 2);
  std::vector<WeightTask> tasks;
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t tap = 0; tap < s.taps(); tap += taps) {
      for (int64_t word = 0; word < s.group_words(); word += words) {
        for (int64_t o = 0; o < s.group_outputs(); o += outputs) {
          tasks.push_back({g, tap, std::min(tap + taps, s.taps()), Channels(s, word, words), o,
                           std::min(o + outputs, s.group_outputs())});
        }
      }
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), wanted == 1, [&](int64_t i) {
    run_weight_task(table, s, tasks[static_cast<size_t>(i)], dtype, grad, x, to);
  });
}

void conv_input_gradient(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* w,
                         const uint32_t* mask, void* to) {
  const SumTable& table = *count_call().sums;
  if (s.batch * s.height * s.width * s.channels == 0) return;
  if (s.products() == 0) {
    std::memset(to, 0, static_cast<size_t>(s.batch * s.height * s.width * s.channels * size_of(dtype)));
    return;
  }
  if (s.depthwise()) return depthwise_input_gradient(table, s, dtype, grad, w, mask, to);
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
        tasks.push_back({image, g, Channels(s, word, words)});
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), wanted == 1, [&](int64_t i) {
    run_input_task(table, plan, tasks[static_cast<size_t>(i)], dtype, grad, mask, to);
  });
}

}  // namespace bop2nd

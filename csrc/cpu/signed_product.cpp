// SPDX-License-Identifier: Apache-2.0
// Plans products of signs with real numbers and integers.
//
// A product is one of rows: what an output pixel sees, tap after tap, each tap's channels filled up with
// zeros to a multiple of 4 (weights whose channels are no multiple of 32 are packed again that way, so that 3
// channels take 4 numbers of a row and not 32). Three ways:
//
//   few rows (signed_lookup.inl)    weights are read once, as bits; their sums of four are looked up
//   real (signed_sums.inl)          tables of 16 sums for as many pixels as two vectors have lanes
//   integers (signed_bytes.inl, tiles.inl)   signs become bytes in the caches
//
// The sums of a task lie in memory of a thread; the epilogue is made of whole rows of them.
#include "signed_product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "convolution.h"
#include "dispatch.h"
#include "gradient.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"

namespace bop2nd {
namespace {

// Up to so many rows are looked up one by one.
constexpr int64_t kFewRows = 4;
// Outputs of a task: sums of as many pixels as a vector has lanes stay in the second-level cache.
constexpr int64_t kTaskOutputs = 1024;
// Bytes of the rows, and numbers of the sums, of a task of integers.
constexpr int64_t kTaskRowBytes = 512 << 10, kTaskSums = 1 << 16;
constexpr int64_t kTasksPerThread = 3;
// Weights of 32 outputs are bytes at a time up to so many chunks of 64 bits: see tile_convolution.cpp. Here
// many rows share them, so that they may leave the nearest cache.
constexpr int64_t kPanelChunks = 64;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Plan {
  SignedProduct p;
  const KernelTable* table;
  int64_t channels;   // of a tap in a row, a multiple of 4
  int64_t row_words;  // of a row of weights
  int64_t out_image;  // output pixels of an image
  int64_t n_pixels;
  ScratchVector<uint32_t> packed_again, blocked_again, by_chunk;
  const uint32_t* rows = nullptr;  // [out_channels, row_words]
  ScratchVector<int32_t> corrections;
  ScratchVector<int32_t> correction_of;  // [out height * out width]: number of the correction
  int64_t correction_stride = 0;

  const ConvShape& s() const { return p.shape; }
  int64_t row_numbers() const { return row_words * kWordBits; }
  bool real() const { return p.input == SignedInput::kReal; }
};

// A convolution that looks at one pixel at a time, as one whose pixels are columns of few rows.
void straighten(SignedProduct& p) {
  ConvShape& s = p.shape;
  if (!s.pointwise()) return;
  if (s.height == 1 || p.row_stride == s.width * p.column_stride) {
    if (s.width == 1) p.column_stride = p.row_stride;
    s.width *= s.height, s.height = 1;
  }
  if (s.height == 1 && (s.batch == 1 || p.image_stride == s.width * p.column_stride || s.width == 1)) {
    if (s.width == 1) p.column_stride = p.image_stride;
    s.width *= s.batch, s.batch = 1;
  }
}

// Weight rows whose taps hold `channels` bits each, side by side.
void pack_again(Plan& plan) {
  const ConvShape& s = plan.s();
  int64_t words = s.group_words(), per_tap = s.group_channels();
  plan.packed_again.assign(static_cast<size_t>(s.out_channels * plan.row_words), 0);
  parallel_ranges(s.out_channels, ceil_div(256, plan.row_words), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      uint32_t* to = plan.packed_again.data() + o * plan.row_words;
      const uint32_t* from = plan.p.w + o * s.taps() * words;
      for (int64_t tap = 0; tap < s.taps(); ++tap, from += words) {
        for (int64_t c = 0, at = tap * plan.channels; c < per_tap; c += 4, at += 4)
          to[at / kWordBits] |= (from[c / kWordBits] >> c % kWordBits & 15u) << at % kWordBits;
      }
    }
  });
}

void plan_weights(Plan& plan) {
  const ConvShape& s = plan.s();
  plan.channels = s.taps() == 1 ? s.group_channels() : round_up(s.group_channels(), 4);
  plan.row_words = words_for(s.taps() * plan.channels);
  plan.rows = plan.p.w;
  if (plan.row_words == s.taps() * s.group_words() && (s.taps() == 1 || plan.channels % kWordBits == 0))
    return;
  pack_again(plan);
  plan.rows = plan.packed_again.data();
  plan.p.blocked = nullptr;
}

const uint32_t* blocked_rows(Plan& plan) {
  if (plan.p.blocked) return plan.p.blocked;
  const ConvShape& s = plan.s();
  plan.blocked_again.resize(static_cast<size_t>(s.groups * s.group_blocks() * 16 * plan.row_words));
  prepack_weight(plan.rows, s.out_channels, s.groups, plan.row_words, plan.blocked_again.data());
  return plan.blocked_again.data();
}

// ------------------------------------------------------------------------------------------- epilogue

// Sums of `n_rows` pixels from `first_pixel` on, [n_rows, stride], for outputs from `first_output` on.
void emit(const Plan& plan, const void* sums, int64_t stride, int64_t first_pixel, int64_t n_rows,
          int64_t first_output, int64_t n_outputs, int32_t multiplier) {
  ScratchScope scope;
  const SignedProduct& p = plan.p;
  ScratchVector<const float*> scales;
  ScratchVector<const int32_t*> corrections;
  if (p.input_scale) {
    scales.reserve(static_cast<size_t>(n_rows));
    for (int64_t r = 0; r < n_rows; ++r)
      scales.push_back(p.input_scale + (p.scale_per_image ? (first_pixel + r) / plan.out_image : 0));
  }
  if (!plan.corrections.empty()) {
    int64_t per_image = static_cast<int64_t>(plan.correction_of.size());
    corrections.reserve(static_cast<size_t>(n_rows));
    for (int64_t r = 0; r < n_rows; ++r) {
      int64_t number = plan.correction_of[static_cast<size_t>((first_pixel + r) % per_image)];
      corrections.push_back(plan.corrections.data() + number * plan.correction_stride);
    }
  }
  SignedRows rows{.sums = sums,
                  .sum_stride = stride,
                  .n_rows = n_rows,
                  .multiplier = multiplier,
                  .correction = corrections.empty() ? nullptr : corrections.data(),
                  .input_scale = scales.empty() ? nullptr : scales.data(),
                  .first_pixel = first_pixel,
                  .first_output = first_output,
                  .n_outputs = n_outputs,
                  .all_outputs = plan.s().out_channels};
  const SignedTable& table = *plan.table->signed_products;
  (plan.real() ? table.emit_reals : table.emit_integers)(rows, p.to);
}

// -------------------------------------------------------------------------------------------- few rows

// `dense`: every output pixel sees all channels of just one input pixel.
bool few_rows(int64_t out_pixels, bool dense) { return dense && out_pixels <= kFewRows; }

template <class T>
void make_tables(const T* x, int64_t stride, int64_t n, int64_t n_numbers, T* tables) {
  for (int64_t i = 0; i < n_numbers; i += 4, tables += 16) {
    T four[4], low[4], high[4];
    for (int64_t j = 0; j < 4; ++j) four[j] = i + j < n ? x[(i + j) * stride] : T{0};
    for (int k = 0; k < 2; ++k) {
      T(&half)[4] = k == 0 ? low : high;
      half[0] = four[2 * k] + four[2 * k + 1], half[1] = four[2 * k + 1] - four[2 * k];
      half[2] = four[2 * k] - four[2 * k + 1], half[3] = T{0} - half[0];
    }
    for (int k = 0; k < 16; ++k) tables[k] = low[k % 4] + high[k / 4];
  }
}

void look_up(Plan& plan) {
  const SignedProduct& p = plan.p;
  const ConvShape& s = plan.s();
  const uint32_t* w = blocked_rows(plan);
  int64_t row_tables = plan.row_words * 8 * 16, n_rows = plan.n_pixels, n = s.channels;
  ScratchVector<uint32_t> memory(static_cast<size_t>(n_rows * row_tables) + 16);
  ScratchVector<int32_t> integers(plan.real() ? 0 : static_cast<size_t>(n));
  static_assert(sizeof(float) == sizeof(uint32_t) && sizeof(int32_t) == sizeof(uint32_t), "lanes");
  for (int64_t r = 0; r < n_rows; ++r) {
    uint32_t* tables = memory.data() + r * row_tables;
    int64_t image = r / (s.height * s.width), y = r / s.width % s.height, step = p.channel_stride;
    int64_t at = image * p.image_stride + y * p.row_stride + r % s.width * p.column_stride;
    if (plan.real()) {
      make_tables(static_cast<const float*>(p.x) + at, step, n, plan.row_numbers(),
                  reinterpret_cast<float*>(tables));
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      int32_t number = p.input == SignedInput::kInt8 ? static_cast<const int8_t*>(p.x)[at + i * step]
                                                     : static_cast<const uint8_t*>(p.x)[at + i * step];
      integers[static_cast<size_t>(i)] = p.multiplier * number - p.zero_point;
    }
    make_tables(integers.data(), 1, n, plan.row_numbers(), reinterpret_cast<int32_t*>(tables));
  }
  auto loop = plan.real() ? plan.table->signed_products->look_up_reals
                          : plan.table->signed_products->look_up_integers;
  constexpr int64_t kBlocks = 4;  // of 16 outputs, the largest block
  int64_t n_blocks = s.group_blocks();
  parallel_ranges(ceil_div(n_blocks, kBlocks), ceil_div(1 << 11, plan.row_words),
                  [&](int64_t begin, int64_t end) {
                    uint32_t sums[16 * kBlocks + 16];
                    for (int64_t i = begin; i < end; ++i) {
                      int64_t first = i * kBlocks, last = std::min(n_blocks, first + kBlocks);
                      for (int64_t r = 0; r < n_rows; ++r) {
                        loop({.tables = memory.data() + r * row_tables,
                              .w = w,
                              .row_words = plan.row_words,
                              .outputs = s.out_channels,
                              .first_block = first,
                              .last_block = last,
                              .sums = sums});
                        emit(plan, sums, 16 * kBlocks, r, 1, 16 * first,
                             std::min(s.out_channels - 16 * first, 16 * kBlocks), 1);
                      }
                    }
                  });
}

// ---------------------------------------------------------------------------------------------- tiles

// Neighbouring output pixels of one row of an image.
struct Run {
  int64_t image, y, x, n, lane;
};

ScratchVector<Run> runs_of(const Plan& plan, int64_t first, int64_t n) {
  int64_t width = plan.s().out_size(1), height = plan.s().out_size(0);
  ScratchVector<Run> runs;
  for (int64_t lane = 0; lane < n;) {
    int64_t pixel = first + lane, x = pixel % width, row = pixel / width;
    int64_t count = std::min(width - x, n - lane);
    runs.push_back({.image = row / height, .y = row % height, .x = x, .n = count, .lane = lane});
    lane += count;
  }
  return runs;
}

// Outputs of a run whose tap lies in the image: [begin, end), the others see padding.
void inside(const ConvShape& s, const Run& run, int64_t tap_column, int64_t& begin, int64_t& end) {
  int64_t at = run.x * s.stride[1] + tap_column * s.dilation[1] - s.padding[1];
  begin = at >= 0 ? 0 : std::min(run.n, ceil_div(-at, s.stride[1]));
  end = at >= s.width ? begin : std::clamp<int64_t>((s.width - 1 - at) / s.stride[1] + 1, begin, run.n);
}

// A task: pixels first .. first + n - 1, outputs begin .. end - 1 of all groups or, of one, a part.
struct Task {
  int64_t first, n, begin, end;
};

bool serial(const Plan& plan) { return plan.s().products() < gradient::kSerialProducts * 4; }

// `outputs` and `pixels` of a task at most; more tasks where threads would be without.
ScratchVector<Task> tasks_of(const Plan& plan, int64_t pixels, int64_t unit, int64_t outputs) {
  const ConvShape& s = plan.s();
  int64_t n = s.out_channels;
  outputs = s.groups > 1 ? n : std::min(round_up(outputs, 64), n);
  int64_t n_threads = serial(plan) ? 1 : n_threads_of(pool());
  int64_t wanted = n_threads == 1 ? 1 : kTasksPerThread * n_threads;
  while (pixels > unit && ceil_div(plan.n_pixels, pixels) * ceil_div(n, outputs) < wanted)
    pixels = round_up(ceil_div(pixels, 2), unit);
  while (s.groups == 1 && outputs > 64 && ceil_div(plan.n_pixels, pixels) * ceil_div(n, outputs) < wanted)
    outputs = round_up(ceil_div(outputs, 2), 64);
  ScratchVector<Task> tasks;
  for (int64_t first = 0; first < plan.n_pixels; first += pixels) {
    for (int64_t o = 0; o < n; o += outputs)
      tasks.push_back({.first = first,
                       .n = std::min(pixels, plan.n_pixels - first),
                       .begin = o,
                       .end = std::min(n, o + outputs)});
  }
  return tasks;
}

// ------------------------------------------------------------------------------------------------ real

// numbers[k][lane] of one group: number k of the row that pixel `lane` sees.
void im2col_reals(const Plan& plan, const ScratchVector<Run>& runs, int64_t group, int64_t lanes,
                  float* numbers) {
  const SignedProduct& p = plan.p;
  const ConvShape& s = plan.s();
  const SumTable& sums = *plan.table->sums;
  int64_t per_group = s.group_channels();
  const float* x = static_cast<const float*>(p.x) + group * per_group * p.channel_stride;
  for (int64_t tap = 0; tap < s.taps(); ++tap) {
    int64_t i = tap / s.kernel[1], j = tap % s.kernel[1];
    float* to = numbers + tap * plan.channels * lanes;
    for (const Run& run : runs) {
      int64_t y = run.y * s.stride[0] + i * s.dilation[0] - s.padding[0], begin = 0, end = 0;
      if (y >= 0 && y < s.height) inside(s, run, j, begin, end);
      int64_t column = (run.x + begin) * s.stride[1] + j * s.dilation[1] - s.padding[1];
      const float* from = x + run.image * p.image_stride + y * p.row_stride + column * p.column_stride;
      float* line = to + run.lane;
      int64_t step = s.stride[1] * p.column_stride, n = end - begin;
      for (int64_t c = 0; c < per_group && (begin > 0 || end < run.n); ++c) {
        std::fill(line + c * lanes, line + c * lanes + begin, 0.0f);
        std::fill(line + c * lanes + end, line + c * lanes + run.n, 0.0f);
      }
      if (n == 0) continue;
      line += begin;
      if (p.channel_stride == 1 && per_group > 1) {
        sums.transpose(from, step, n, per_group, line, lanes);
        continue;
      }
      for (int64_t c = 0; c < per_group; ++c, from += p.channel_stride, line += lanes) {
        if (step == 1) {
          std::memcpy(line, from, static_cast<size_t>(n) * sizeof(float));
        } else {
          for (int64_t k = 0; k < n; ++k) line[k] = from[k * step];
        }
      }
    }
  }
}

void run_real_task(const Plan& plan, const Task& task, int64_t lanes) {
  static thread_local std::vector<float> memory;
  ScratchScope scope;
  const ConvShape& s = plan.s();
  const SumTable& table = *plan.table->sums;
  int64_t n_outputs = task.end - task.begin, per_group = s.group_outputs(), n = round_up(n_outputs, 16);
  int64_t group_task = s.groups > 1 ? per_group : n_outputs, numbers = plan.row_numbers() * lanes;
  // Values as they are go right where they belong, and start from +0, so that none is -0.
  const Epilogue& to = plan.p.to;
  bool direct = to.only_values() && to.dtype == Dtype::kFloat32 && !plan.p.input_scale && s.groups == 1;
  float* a = thread_memory(memory, static_cast<size_t>(numbers + (group_task + n) * lanes + 64));
  float *by_output = a + numbers, *by_pixel = by_output + group_task * lanes;
  std::fill(a, a + numbers, 0.0f);
  ScratchVector<Run> runs = runs_of(plan, task.first, task.n);
  for (int64_t g = 0; g < s.groups; ++g) {
    im2col_reals(plan, runs, g, lanes, a);
    int64_t first = s.groups > 1 ? 0 : task.begin;  // in the group
    SignedSums work{.a = a,
                    .a_stride = lanes,
                    .n_chunks = plan.row_words,
                    .signs = plan.by_chunk.data() + g * plan.row_words * per_group + first,
                    .chunk_stride = per_group,
                    .n_segments = 1,
                    .segment_stride = 0,
                    .n = group_task,
                    .sums = by_output,
                    .fresh = !direct,
                    .last_rows = s.taps() * plan.channels - (plan.row_words - 1) * kWordBits};
    if (plan.row_words == 0 || direct) std::fill(by_output, by_output + group_task * lanes, 0.0f);
    table.signed_sums(work);
    if (direct) {
      float* values = static_cast<float*>(to.values) + task.first * s.out_channels + task.begin;
      return table.transpose(by_output, lanes, n_outputs, task.n, values, s.out_channels);
    }
    table.transpose(by_output, lanes, group_task, lanes, by_pixel + (s.groups > 1 ? g * per_group : 0), n);
  }
  emit(plan, by_pixel, n, task.first, task.n, task.begin, n_outputs, 1);
}

void multiply_reals(Plan& plan) {
  const ConvShape& s = plan.s();
  int64_t lanes = plan.table->sums->lanes, per_group = s.group_outputs(), words = plan.row_words;
  plan.by_chunk.resize(static_cast<size_t>(s.out_channels * words));
  parallel_ranges(s.groups * words, ceil_div(1 << 14, per_group), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t* from = plan.rows + i / words * per_group * words + i % words;
      uint32_t* to = plan.by_chunk.data() + i * per_group;
      for (int64_t o = 0; o < per_group; ++o) to[o] = from[o * words];
    }
  });
  ScratchVector<Task> tasks = tasks_of(plan, lanes, lanes, kTaskOutputs);
  parallel_tasks(static_cast<int64_t>(tasks.size()), serial(plan),
                 [&](int64_t i) { run_real_task(plan, tasks[static_cast<size_t>(i)], lanes); });
}

// -------------------------------------------------------------------------------------------- integers

struct BytePlan {
  const Plan& plan;
  const uint32_t* blocked;
  bool tiles;         // else unsigned bytes
  uint8_t flip;       // exclusive or that makes numbers what the loop multiplies
  int64_t row_bytes;  // a multiple of 64; with tiles not of 256
  ScratchVector<TileChunk> chunks;
};

// correction[number][output] = -offset * (sum of the weights of the taps in the image), for all places of
// taps that there are.
void plan_corrections(Plan& plan, int64_t offset) {
  const ConvShape& s = plan.s();
  ScratchVector<ScratchVector<bool>> seen[2];  // sets of kernel positions in the image
  ScratchVector<int64_t> set_of[2];
  for (int axis = 0; axis < 2; ++axis) {
    ScratchVector<bool> positions;
    positions.reserve(static_cast<size_t>(s.kernel[axis]));
    for (int64_t o = 0; o < s.out_size(axis); ++o) {
      positions.clear();
      for (int64_t i = 0; i < s.kernel[axis]; ++i) {
        int64_t at = o * s.stride[axis] + i * s.dilation[axis] - s.padding[axis];
        positions.push_back(at >= 0 && at < s.in_size(axis));
      }
      auto found = std::find(seen[axis].begin(), seen[axis].end(), positions);
      set_of[axis].push_back(found - seen[axis].begin());
      if (found == seen[axis].end()) seen[axis].push_back(positions);
    }
  }
  int64_t n_columns = static_cast<int64_t>(seen[1].size()), words = s.group_words();
  for (int64_t row : set_of[0]) {
    for (int64_t column : set_of[1])
      plan.correction_of.push_back(static_cast<int32_t>(row * n_columns + column));
  }
  plan.correction_stride = round_up(s.out_channels, 16) + 16;
  size_t stride = static_cast<size_t>(plan.correction_stride), n_taps = static_cast<size_t>(s.taps());
  plan.corrections.assign(seen[0].size() * seen[1].size() * stride, 0);
  ScratchVector<uint32_t> of_taps(n_taps * stride);  // modulo 2^32, as all sums here
  uint32_t* corrections = reinterpret_cast<uint32_t*>(plan.corrections.data());
  parallel_ranges(s.out_channels, ceil_div(1 << 12, std::max<int64_t>(1, s.taps() * words)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t o = begin; o < end; ++o) {
                      const uint32_t* w = plan.p.w + o * s.taps() * words;
                      for (size_t tap = 0; tap < n_taps; ++tap, w += words) {
                        int64_t negative = 0;
                        for (int64_t i = 0; i < words; ++i) negative += __builtin_popcount(w[i]);
                        int64_t sum = s.group_channels() - 2 * negative;
                        of_taps[tap * stride + static_cast<size_t>(o)] = static_cast<uint32_t>(-offset * sum);
                      }
                    }
                    uint32_t* to = corrections;
                    for (const ScratchVector<bool>& row : seen[0]) {
                      for (const ScratchVector<bool>& column : seen[1]) {
                        for (size_t tap = 0; tap < n_taps; ++tap) {
                          if (!row[tap / column.size()] || !column[tap % column.size()]) continue;
                          const uint32_t* from = of_taps.data() + tap * stride;
                          for (int64_t o = begin; o < end; ++o) to[o] += from[o];
                        }
                        to += stride;
                      }
                    }
                  });
}

// Rows of bytes of one group. Bytes of padding, and behind a tap's channels, are 0 and stay what they are.
void im2col_bytes(const BytePlan& b, const ScratchVector<Run>& runs, int64_t group, uint8_t* bytes) {
  const Plan& plan = b.plan;
  const SignedProduct& p = plan.p;
  const ConvShape& s = plan.s();
  int64_t per_group = s.group_channels();
  if (per_group == 0) return;
  const uint8_t* x = static_cast<const uint8_t*>(p.x);
  for (const Run& run : runs) {
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      int64_t i = tap / s.kernel[1], j = tap % s.kernel[1];
      int64_t y = run.y * s.stride[0] + i * s.dilation[0] - s.padding[0], begin = 0, end = 0;
      if (y >= 0 && y < s.height) inside(s, run, j, begin, end);
      int64_t column = (run.x + begin) * s.stride[1] + j * s.dilation[1] - s.padding[1];
      int64_t at = group * per_group * p.channel_stride + run.image * p.image_stride + y * p.row_stride +
                   column * p.column_stride;
      const uint8_t* from = begin < end ? x + at : x;  // an image without pixels may have no address
      uint8_t* to = bytes + run.lane * b.row_bytes + tap * plan.channels;
      for (int64_t k = 0; k < begin; ++k)
        std::memset(to + k * b.row_bytes, 0, static_cast<size_t>(per_group));
      for (int64_t k = end; k < run.n; ++k)
        std::memset(to + k * b.row_bytes, 0, static_cast<size_t>(per_group));
      int64_t step = s.stride[1] * p.column_stride;
      to += begin * b.row_bytes;
      for (int64_t k = begin; k < end; ++k, from += step, to += b.row_bytes) {
        if (p.channel_stride == 1 && b.flip == 0) {
          std::memcpy(to, from, static_cast<size_t>(per_group));
        } else {
          for (int64_t c = 0; c < per_group; ++c)
            to[c] = static_cast<uint8_t>(from[c * p.channel_stride] ^ b.flip);
        }
      }
    }
  }
}

void multiply_tiles(const BytePlan& b, const Task& task, int64_t group, const int8_t* bytes, int64_t first,
                    int64_t n_outputs, int32_t* sums, int64_t stride) {
  static thread_local std::vector<int8_t> memory;
  ScratchScope scope;
  const Plan& plan = b.plan;
  const ConvShape& s = plan.s();
  ScratchVector<int64_t> offsets;
  for (int64_t row = 0; row < task.n; row += kTileRows) offsets.push_back(row * b.row_bytes);
  TileWork work{};
  work.x = bytes, work.pixel_bytes = b.row_bytes;
  work.x_offset = offsets.data(), work.n_tiles = static_cast<int64_t>(offsets.size());
  work.chunks = b.chunks.data(), work.n_chunks = static_cast<int64_t>(b.chunks.size());
  work.row_words = plan.row_words, work.outputs = s.group_outputs();
  work.w = b.blocked + group * s.group_blocks() * 16 * plan.row_words;
  work.first_column = first / 16, work.last_column = ceil_div(first + n_outputs, 16);
  work.ring = work.n_chunks > kPanelChunks;
  int64_t at_once = work.ring ? kTileRing : work.n_chunks;
  work.tiles = thread_memory(memory, static_cast<size_t>(2 * at_once * kTileBytes));
  work.sums = sums, work.sum_stride = stride;
  plan.table->tiles->multiply(work);
}

void run_byte_task(const BytePlan& b, const Task& task) {
  static thread_local std::vector<uint8_t> memory;
  static thread_local std::vector<int32_t> sum_memory;
  ScratchScope scope;
  const Plan& plan = b.plan;
  const ConvShape& s = plan.s();
  int64_t n_outputs = task.end - task.begin, per_group = s.group_outputs();
  int64_t group_task = s.groups > 1 ? per_group : n_outputs, group_sums = round_up(group_task, 64);
  int64_t rows = round_up(task.n, kTileRows), all = s.groups > 1 ? round_up(n_outputs, 16) : 0;
  int64_t n_bytes = rows * b.row_bytes;
  uint8_t* bytes = thread_memory(memory, static_cast<size_t>(n_bytes + kBytePanelBytes));
  int32_t* sums = thread_memory(sum_memory, static_cast<size_t>(rows * (group_sums + all) + 16));
  int32_t* together = sums + rows * group_sums;
  ScratchVector<Run> runs = runs_of(plan, task.first, task.n);
  for (int64_t g = 0; g < s.groups; ++g) {
    if (g == 0 || b.tiles) std::memset(bytes, 0, static_cast<size_t>(n_bytes));
    im2col_bytes(b, runs, g, bytes);
    int64_t first = s.groups > 1 ? 0 : task.begin;
    if (plan.row_words == 0) {
      std::fill(sums, sums + rows * group_sums, 0);
    } else if (b.tiles) {
      plan.table->tiles->order_bytes(reinterpret_cast<int8_t*>(bytes), n_bytes);
      multiply_tiles(b, task, g, reinterpret_cast<const int8_t*>(bytes), first, group_task, sums, group_sums);
    } else {
      plan.table->signed_products->multiply_bytes(
          {.x = bytes,
           .row_bytes = b.row_bytes,
           .n_rows = task.n,
           .w = b.blocked + g * s.group_blocks() * 16 * plan.row_words,
           .row_words = plan.row_words,
           .outputs = per_group,
           .first_block = first / 16,
           .last_block = ceil_div(first + group_task, 16),
           .sums = sums,
           .sum_stride = group_sums,
           .panel = reinterpret_cast<int8_t*>(bytes + n_bytes)});
    }
    for (int64_t r = 0; r < task.n && all > 0; ++r)
      std::memcpy(together + r * all + g * per_group, sums + r * group_sums,
                  static_cast<size_t>(per_group) * sizeof(int32_t));
  }
  bool joined = all > 0;
  emit(plan, joined ? together : sums, joined ? all : group_sums, task.first, task.n, task.begin, n_outputs,
       plan.p.multiplier);
}

void multiply_integers(Plan& plan) {
  const SignedProduct& p = plan.p;
  bool tiles = plan.table->tiles && plan.table->tiles->order_bytes;
  bool flips = tiles == (p.input == SignedInput::kUint8);  // tiles are signed, the others unsigned
  // x = multiplier * (byte +- 128) - zero_point
  int64_t offset = p.zero_point + (!flips ? 0 : tiles ? -128 : 128) * static_cast<int64_t>(p.multiplier);
  if (offset != 0) plan_corrections(plan, offset);
  BytePlan b{.plan = plan,
             .blocked = blocked_rows(plan),
             .tiles = tiles,
             .flip = static_cast<uint8_t>(flips ? 0x80 : 0),
             .row_bytes = round_up(plan.row_numbers(), 64),
             .chunks = {}};
  if (b.row_bytes % 256 == 0) b.row_bytes += 64;  // see tile_convolution.cpp
  add_chunks(b.chunks, 0, 0, plan.row_words);
  int64_t outputs = std::min<int64_t>(kTaskOutputs, round_up(plan.s().out_channels, 64));
  int64_t rows = std::min(kTaskRowBytes / b.row_bytes, kTaskSums / outputs) / 32 * 32;
  rows = std::clamp<int64_t>(rows, 32, 256);
  if (plan.s().groups == 1) outputs = std::max<int64_t>(64, kTaskSums / rows / 64 * 64);
  ScratchVector<Task> tasks = tasks_of(plan, rows, 32, outputs);
  parallel_tasks(static_cast<int64_t>(tasks.size()), serial(plan),
                 [&](int64_t i) { run_byte_task(b, tasks[static_cast<size_t>(i)]); });
}

}  // namespace

void signed_product(const SignedProduct& product) {
  ScratchScope scope;
  Plan plan{};
  plan.p = product, plan.table = &active_table();
  plan.out_image = std::max<int64_t>(1, product.shape.out_size(0) * product.shape.out_size(1));
  plan.n_pixels = product.shape.out_pixels();
  if (plan.n_pixels == 0 || product.shape.out_channels == 0) return;
  straighten(plan.p);
  plan_weights(plan);
  const ConvShape& s = plan.s();
  if (few_rows(plan.n_pixels, s.pointwise() && s.groups == 1) && plan.row_words > 0) return look_up(plan);
  plan.real() ? multiply_reals(plan) : multiply_integers(plan);
}

SignedLoop signed_loop(int64_t out_pixels, bool dense, bool real) {
  if (few_rows(out_pixels, dense)) return SignedLoop::kFewRows;
  if (real) return SignedLoop::kSumTables;
  const KernelTable& table = *table_of(bop2nd_isa_active());
  return table.tiles && table.tiles->order_bytes ? SignedLoop::kByteTiles : SignedLoop::kByteLanes;
}

int64_t quantize_rows(Dtype dtype, const void* x, int64_t n_rows, int64_t length, bool per_row, int8_t* q,
                      float* scale) {
  ScratchScope scope;
  const KernelTable& table = active_table();
  const SignedTable& loops = *table.signed_products;
  int64_t grain = ceil_div(1 << 15, std::max<int64_t>(1, length)), size = gradient::size_of(dtype);
  ScratchVector<float> largest(static_cast<size_t>(n_rows), 0.0f);
  auto row_of = [&](int64_t r, ScratchVector<float>& wide) {
    const char* row = static_cast<const char*>(x) + r * length * size;
    if (dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(row);
    wide.resize(static_cast<size_t>(length));
    table.sums->load_reals(dtype, row, length, wide.data());
    return static_cast<const float*>(wide.data());
  };
  std::atomic<int64_t> not_finite{0};
  auto quantize = [&](int64_t r, float by, ScratchVector<float>& wide) {
    loops.quantize(row_of(r, wide), length, by, q + r * length);
  };
  parallel_ranges(n_rows, grain, [&](int64_t begin, int64_t end) {
    ScratchScope own;
    ScratchVector<float> wide;
    for (int64_t r = begin; r < end; ++r) {
      float most = loops.largest(row_of(r, wide), length);
      largest[static_cast<size_t>(r)] = most;
      if (!(most < __builtin_inff())) {
        not_finite.fetch_add(1);
      } else if (per_row) {
        scale[r] = most / 127.0f;
        quantize(r, scale[r], wide);
      }
    }
  });
  if (per_row || not_finite.load() > 0) return not_finite.load();
  float most = 0.0f;
  for (float of_row : largest) most = std::max(most, of_row);
  scale[0] = most / 127.0f;
  parallel_ranges(n_rows, grain, [&](int64_t begin, int64_t end) {
    ScratchScope own;
    ScratchVector<float> wide;
    for (int64_t r = begin; r < end; ++r) quantize(r, scale[0], wide);
  });
  return 0;
}

}  // namespace bop2nd

extern "C" __attribute__((visibility("default"))) int bop2nd_signed_loop(int64_t out_pixels, int dense,
                                                                         int real) {
  return static_cast<int>(bop2nd::signed_loop(out_pixels, dense != 0, real != 0));
}

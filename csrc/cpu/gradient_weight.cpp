// SPDX-License-Identifier: Apache-2.0
// gradient[o][tap][c] = sum over output pixels of grad[pixel][o] * sign of the input there. Rows of the real
// matrix are pixels, its lanes are outputs; the signs that one tap sees of 32 pixels are transposed.
#include <algorithm>
#include <cstring>

#include "convolution.h"
#include "dispatch.h"
#include "gradient.h"
#include "parallel.h"

namespace bop2nd {
namespace {

using namespace gradient;

constexpr int64_t kPixelChunks = 4;  // read at a time

struct WeightTask {
  int64_t group, first_tap, last_tap;
  Channels channels;
  int64_t first_output, last_output;  // of the group
};

// What 32 output pixels see: the words of their inputs, for one tap after the other.
class TapWindow {
 public:
  TapWindow(const ConvShape& s, const uint32_t* x, int64_t group, const Channels& channels)
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
  TapWindow window(s, x, task.group, channels);
  int64_t first_output = task.group * s.group_outputs() + task.first_output;
  for (int64_t first = 0; first < n_pixels; first += kPixelChunks * kWordBits) {
    int64_t n = std::min(kPixelChunks * kWordBits, n_pixels - first), n_chunks = ceil_div(n, kWordBits);
    for (int64_t p = 0; p < n; ++p)
      table.load_reals(dtype, element(dtype, grad, (first + p) * s.out_channels + first_output), n_outputs,
                       reals + p * width);
    std::fill(reals + n * width, reals + n_chunks * kWordBits * width, 0.0f);
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
      int64_t pixel = chunk * kWordBits;
      window.look_at(first + pixel, static_cast<int>(std::min<int64_t>(kWordBits, n - pixel)));
      for (int64_t tap = 0; tap < n_taps; ++tap) {
        const uint32_t* rows[kWordBits];
        uint32_t outside = window.rows(task.first_tap + tap, rows);
        table.transpose_bits(rows, channels.n_words, signs + chunk * chunk_signs + tap * channels.n);
        if (s.padding_value != 0) continue;
        for (; outside != 0; outside &= outside - 1) {
          const float* row = reals + (pixel + __builtin_ctz(outside)) * width;
          for (int64_t o = 0; o < width; ++o) padded[tap * width + o] += row[o];
        }
      }
    }
    for (int64_t o = 0; o < width; o += table.lanes) {
      table.signed_sums({.a = reals + o,
                         .a_stride = width,
                         .n_chunks = n_chunks,
                         .signs = signs,
                         .chunk_stride = chunk_signs,
                         .n_segments = 1,
                         .segment_stride = 0,
                         .n = n_sums,
                         .sums = sums + n_sums * o,
                         .fresh = first == 0});
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

void depthwise_weight_gradient(const SumTable& table, const ConvShape& s, Dtype dtype, const void* grad,
                               const uint32_t* x, float* to) {
  const TrainingTable& training = *training_of(bop2nd_isa_active());
  int64_t width = table.lanes;
  parallel_tasks(ceil_div(s.channels, width), wanted_tasks(s) == 1, [&](int64_t i) {
    int64_t first = i * width, n = std::min(width, s.channels - first);
    Arena arena{s.taps() * width};
    float* sums = arena.take(s.taps() * width);
    training.depthwise_weights(s, dtype, grad, x, first, static_cast<int>(n), sums);
    table.transpose(sums, width, s.taps(), n, to + first * s.taps(), s.taps());
  });
}

}  // namespace

void conv_weight_gradient(const ConvShape& s, Dtype dtype, const void* grad, const uint32_t* x, float* to) {
  const SumTable& table = *active_table().sums;
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
          tasks.push_back({.group = g,
                           .first_tap = tap,
                           .last_tap = std::min(tap + taps, s.taps()),
                           .channels = Channels(s, word, words),
                           .first_output = o,
                           .last_output = std::min(o + outputs, s.group_outputs())});
        }
      }
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), wanted == 1, [&](int64_t i) {
    run_weight_task(table, s, tasks[static_cast<size_t>(i)], dtype, grad, x, to);
  });
}

}  // namespace bop2nd

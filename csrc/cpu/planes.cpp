// SPDX-License-Identifier: Apache-2.0
// Images whose channels are planes (torch's contiguous format) beside those whose pixels hold their channels
// side by side (channels-last), which all loops read and write.
//
// Cost: reads and writes every element once. A convolution into planes computes as many images as the
// threads' second-level caches hold, then transposes them from there.
#include <algorithm>
#include <memory>

#include "convolution.h"
#include "dispatch.h"
#include "gradient.h"
#include "parallel.h"

namespace bop2nd {
namespace {

// Pixels are written in whole lines of a cache: 64 numbers of 4 or 2 bytes.
constexpr int64_t kRows = 64, kColumns = 16;
constexpr int64_t kImageBytes = 1 << 20;  // for each thread

struct Reals {
  Dtype dtype;
  const void* at;
};

void transpose_images(Reals from, int64_t n_images, int64_t rows, int64_t columns, Dtype dtype, void* to) {
  const SumTable& table = *active_table().sums;
  int64_t blocks = ceil_div(rows, kRows),
          grain = ceil_div(int64_t{1} << 14, kRows * std::max<int64_t>(1, columns));
  parallel_ranges(n_images * blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float wide[kRows * kColumns], tile[kColumns * kRows];
    for (int64_t i = begin; i < end; ++i) {
      int64_t image = i / blocks, row = i % blocks * kRows, n_rows = std::min(kRows, rows - row);
      for (int64_t column = 0; column < columns; column += kColumns) {
        int64_t n = std::min(kColumns, columns - column), stride = columns;
        const char* at = gradient::element(from.dtype, from.at, (image * rows + row) * columns + column);
        const float* source = reinterpret_cast<const float*>(at);
        if (from.dtype != Dtype::kFloat32) {
          source = wide, stride = kColumns;
          for (int64_t r = 0; r < n_rows; ++r, at += gradient::size_of(from.dtype) * columns)
            table.load_reals(from.dtype, at, n, wide + r * kColumns);
        }
        table.transpose(source, stride, n_rows, n, tile, kRows);
        for (int64_t c = 0; c < n; ++c) {
          const char* line = gradient::element(dtype, to, (image * columns + column + c) * rows + row);
          table.store_reals(tile + c * kRows, n_rows, nullptr, dtype, const_cast<char*>(line));
        }
      }
    }
  });
}

}  // namespace

void transpose_images(Dtype dtype, const void* from, int64_t n_images, int64_t rows, int64_t columns,
                      void* to) {
  transpose_images({dtype, from}, n_images, rows, columns, dtype, to);
}

void binary_conv_planes(const ConvShape& s, const uint32_t* x, const uint32_t* blocked, Dtype dtype,
                        void* to) {
  int64_t n_pixels = s.out_size(0) * s.out_size(1), image = n_pixels * s.out_channels;
  if (s.batch == 0 || image == 0) return;
  ConvShape part = s;
  part.batch = std::clamp<int64_t>(n_threads_of(pool()) * kImageBytes / 4 / image, 1, s.batch);
  std::unique_ptr<float[]> dots(new float[static_cast<size_t>(part.batch * image)]);
  Epilogue plain;
  plain.values = dots.get();
  for (int64_t first = 0; first < s.batch; first += part.batch) {
    part.batch = std::min(part.batch, s.batch - first);
    binary_conv(part, x + first * s.height * s.width * s.groups * s.group_words(), blocked, plain);
    char* planes = const_cast<char*>(gradient::element(dtype, to, first * image));
    transpose_images({Dtype::kFloat32, dots.get()}, part.batch, n_pixels, s.out_channels, dtype, planes);
  }
}

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// Plans a binary convolution as products of tiles of bytes (tiles.inl).
//
// A band of the image (some rows, or whole images where they are small) is unpacked into bytes, its border
// written out: padding of 0, +1 and -1 are bytes like any other. With a stride the columns and rows of every
// phase (x % stride) lie together. So the pixels that one tap shows to neighbouring outputs are neighbours,
// and 16 outputs' operands are 16 rows of a tile at one distance: a tile is loaded right from the band,
// nothing is gathered. Tiles run over the ends of rows: what they compute there belongs to no output and is
// dropped (2 columns of 58, 30, 16, 9 in a 3x3 convolution).
#include <algorithm>
#include <cstring>

#include "../core/bit_layout.h"
#include "convolution.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace bop2nd {
namespace {

// Bytes of a band: with the weights of a block they fit in a second-level cache of 2 MiB.
constexpr int64_t kBandBytes = 512 << 10;
// What one row of the output looks at may take more; not this much: far dilations of wide borders are
// counted.
constexpr int64_t kWidestRow = 64 << 20;
// Weights of 32 outputs with more chunks of 64 bits than this, 2 KiB each, would crowd the pixels out of the
// nearest cache: they are unpacked again for every 32 pixels. bench_core, microseconds for limits of 0, 12,
// 17: 110, 96, 99 at 64 channels (9 chunks), 93, 92, 91 at 128 (18); linear 1024 by 256 (16 chunks) took 262
// unpacked again and 295 not. Timed once with this constant changed by hand; bench_core times what stands
// here.
constexpr int64_t kPanelChunks = 12;
// Fewer products of tiles than this (7 ns each) are not worth a second thread.
constexpr int64_t kSerialProducts = 2000;
constexpr int64_t kTasksPerThread = 2;

// The input pixels that a band needs, as bytes: planes of phases [rows, columns, pixel_bytes].
struct Band {
  int64_t out_rows;       // of the output
  int64_t rows, columns;  // of a plane
  int64_t pixel_bytes;
  ScratchVector<int64_t> row_phases, column_phases;  // x % stride that some tap looks at
  int64_t n_planes = 0;                              // [row phases, column phases]
  ScratchVector<TileChunk> chunks;

  int64_t plane_bytes() const { return rows * columns * pixel_bytes; }
  int64_t image_bytes() const { return n_planes * plane_bytes(); }
  int64_t n_positions(const ConvShape& s) const { return (out_rows - 1) * columns + s.out_size(1); }
};

// From one pixel to the next. Rows of a tile 256 bytes or a multiple apart would crowd into a few sets of the
// nearest cache: a line more spreads them.
int64_t pixel_bytes(const ConvShape& s) {
  int64_t bytes = 32 * s.group_words();
  return bytes % 256 == 0 ? bytes + 64 : bytes;
}

// Rows or columns of a plane that n outputs look at.
int64_t plane_size(const ConvShape& s, int axis, int64_t n) {
  return n + (s.kernel[axis] - 1) * s.dilation[axis] / s.stride[axis];
}

int64_t number_of(ScratchVector<int64_t>& phases, int64_t phase) {
  auto found = std::find(phases.begin(), phases.end(), phase);
  if (found == phases.end()) found = phases.insert(found, phase);
  return found - phases.begin();
}

Band band_of(const ConvShape& s, int64_t out_rows) {
  Band b;
  b.out_rows = out_rows;
  b.rows = plane_size(s, 0, out_rows), b.columns = plane_size(s, 1, s.out_size(1));
  b.pixel_bytes = pixel_bytes(s);
  for (int axis = 0; axis < 2; ++axis) {
    ScratchVector<int64_t>& phases = axis == 0 ? b.row_phases : b.column_phases;
    for (int64_t i = 0; i < s.kernel[axis]; ++i) number_of(phases, i * s.dilation[axis] % s.stride[axis]);
  }
  int64_t n_columns = static_cast<int64_t>(b.column_phases.size());
  b.n_planes = static_cast<int64_t>(b.row_phases.size()) * n_columns;
  int64_t words = s.group_words(), run_offset = 0, run_first = 0, run_words = 0;
  for (int64_t i = 0; i < s.kernel[0]; ++i) {
    for (int64_t j = 0; j < s.kernel[1]; ++j) {
      int64_t y = i * s.dilation[0], x = j * s.dilation[1];
      int64_t plane =
          number_of(b.row_phases, y % s.stride[0]) * n_columns + number_of(b.column_phases, x % s.stride[1]);
      int64_t pixel = y / s.stride[0] * b.columns + x / s.stride[1];
      int64_t offset = plane * b.plane_bytes() + pixel * b.pixel_bytes;
      if (run_words > 0 && offset == run_offset + 32 * run_words) {  // taps side by side share chunks
        run_words += words;
        continue;
      }
      add_chunks(b.chunks, run_offset, run_first, run_words);
      run_offset = offset, run_first = (i * s.kernel[1] + j) * words, run_words = words;
    }
  }
  add_chunks(b.chunks, run_offset, run_first, run_words);
  return b;
}

struct TilePlan {
  const ConvShape& shape;
  const TileTable& table;
  const uint32_t *x, *blocked;
  const Epilogue& to;
  ScratchVector<int8_t> padding;  // bytes of a padded pixel
};

// Output rows first_row .. of n_images images, for columns (of 16 outputs) of one group.
struct TileTask {
  const Band* band;
  int64_t first_image, n_images, first_row;
  int64_t group, first_column, last_column;
};

// Columns q .. of one row and phase; `source` is input column 0 of the row, null above and below the image.
void unpack_row(const TilePlan& plan, const Band& b, const uint32_t* source, int64_t phase, int8_t* to) {
  const ConvShape& s = plan.shape;
  int64_t sx = s.stride[1], begin = 0, end = 0;  // columns of the plane inside the image
  if (source) {
    begin = std::min(b.columns, std::max<int64_t>(0, ceil_div(s.padding[1] - phase, sx)));
    end = std::clamp(ceil_div(s.width + s.padding[1] - phase, sx), begin, b.columns);
  }
  auto pad = [&](int64_t from, int64_t until) {
    for (int64_t q = from; q < until; ++q)
      std::memcpy(to + q * b.pixel_bytes, plan.padding.data(), static_cast<size_t>(b.pixel_bytes));
  };
  pad(0, begin);
  if (end > begin) {
    int64_t pixel_words = s.groups * s.group_words(), words = s.group_words();
    int64_t column = begin * sx + phase - s.padding[1];
    plan.table.pixels({.x = source + column * pixel_words,
                       .x_stride = sx * pixel_words,
                       .n_pixels = end - begin,
                       .n_words = words,
                       .last_channels = BitLayout{s.group_channels()}.elements_in(words - 1),
                       .bytes = to + begin * b.pixel_bytes,
                       .byte_stride = b.pixel_bytes});
  }
  pad(end, b.columns);
}

void unpack_band(const TilePlan& plan, const TileTask& task, int8_t* bytes) {
  const ConvShape& s = plan.shape;
  const Band& b = *task.band;
  int64_t pixel_words = s.groups * s.group_words();
  for (int64_t n = 0; n < task.n_images; ++n, bytes += b.image_bytes()) {
    const uint32_t* image = plan.x + (task.first_image + n) * s.height * s.width * pixel_words;
    image += task.group * s.group_words();
    for (int64_t row = 0; row < b.rows; ++row) {
      int8_t* to = bytes + row * b.columns * b.pixel_bytes;
      for (int64_t py : b.row_phases) {
        int64_t y = (task.first_row + row) * s.stride[0] + py - s.padding[0];
        const uint32_t* source = y >= 0 && y < s.height ? image + y * s.width * pixel_words : nullptr;
        for (int64_t px : b.column_phases) {
          unpack_row(plan, b, source, px, to);
          to += b.plane_bytes();
        }
      }
    }
  }
}

// Tiles of 16 neighbouring positions: where they start, and the output pixels of their rows (-1: none).
struct TilePlaces {
  ScratchVector<int64_t> x_offset, out_pixel;

  TilePlaces(const ConvShape& s, const TileTask& task) {
    const Band& b = *task.band;
    int64_t height = s.out_size(0), width = s.out_size(1), n_positions = b.n_positions(s);
    int64_t n_tiles = ceil_div(n_positions, kTileRows);
    x_offset.resize(static_cast<size_t>(task.n_images * n_tiles));
    out_pixel.assign(x_offset.size() * kTileRows, -1);
    for (int64_t n = 0; n < task.n_images; ++n) {
      for (int64_t t = 0; t < n_tiles; ++t)
        x_offset[static_cast<size_t>(n * n_tiles + t)] = n * b.image_bytes() + t * kTileRows * b.pixel_bytes;
      int64_t pixel = ((task.first_image + n) * height + task.first_row) * width;
      for (int64_t row = 0; row < b.out_rows; ++row, pixel += width) {
        int64_t* to = out_pixel.data() + n * n_tiles * kTileRows + row * b.columns;
        for (int64_t x = 0; x < width; ++x) to[x] = pixel + x;
      }
    }
  }
};

void run_tile_task(const TilePlan& plan, const TileTask& task) {
  static thread_local std::vector<int8_t> memory, tile_memory;
  ScratchScope scope;
  const ConvShape& s = plan.shape;
  const Band& b = *task.band;
  // A tile may reach past the last position by 15 pixels, and past the last chunk by a word.
  int64_t band_bytes = task.n_images * b.image_bytes() + kTileRows * b.pixel_bytes + 64;
  int8_t* bytes = thread_memory(memory, static_cast<size_t>(band_bytes));
  unpack_band(plan, task, bytes);
  TilePlaces places(s, task);
  TileWork work{};
  work.x = bytes, work.pixel_bytes = b.pixel_bytes;
  work.x_offset = places.x_offset.data(), work.out_pixel = places.out_pixel.data();
  work.n_tiles = static_cast<int64_t>(places.x_offset.size());
  work.chunks = b.chunks.data(), work.n_chunks = static_cast<int64_t>(b.chunks.size());
  work.row_words = s.taps() * s.group_words(), work.outputs = s.group_outputs();
  work.w = plan.blocked + task.group * s.group_blocks() * 16 * work.row_words;
  work.first_column = task.first_column, work.last_column = task.last_column;
  work.first_output = task.group * work.outputs, work.all_outputs = s.out_channels;
  work.ring = work.n_chunks > kPanelChunks;
  int64_t chunks_at_once = work.ring ? kTileRing : work.n_chunks;
  work.tiles = thread_memory(tile_memory, static_cast<size_t>(2 * chunks_at_once * kTileBytes));
  work.to = &plan.to;
  plan.table.multiply(work);
}

ScratchVector<int8_t> padded_pixel(const ConvShape& s) {
  ScratchVector<int8_t> bytes(static_cast<size_t>(pixel_bytes(s)), 0);
  for (int64_t c = 0; c < s.group_channels(); ++c) {  // byte 4 t + k of a word is bit 8 k + t
    int64_t bit = c % kWordBits;
    bytes[static_cast<size_t>(c - bit + bit % 8 * 4 + bit / 8)] = static_cast<int8_t>(s.padding_value);
  }
  return bytes;
}

// A convolution that looks at one pixel at a time is one of a single column, in which no position is lost.
ConvShape straightened(ConvShape s) {
  if (s.pointwise()) s.height *= s.batch * s.width, s.batch = s.width = 1;
  return s;
}

}  // namespace

void add_chunks(ScratchVector<TileChunk>& chunks, int64_t x_offset, int64_t first_word, int64_t n_words) {
  for (int64_t w = 0; w < n_words; w += 2) {
    chunks.push_back({.x_offset = x_offset + 32 * w,
                      .first_word = static_cast<int32_t>(first_word + w),
                      .n_words = static_cast<int32_t>(std::min<int64_t>(2, n_words - w))});
  }
}

bool tiles_pay(const ConvShape& s) {
  if (s.out_pixels() < 8 || s.channels == 0) return false;
  int64_t planes = std::min(s.kernel[0], s.stride[0]) * std::min(s.kernel[1], s.stride[1]);
  int64_t pixels = planes * plane_size(s, 0, 1) * plane_size(s, 1, s.out_size(1));
  return pixels * pixel_bytes(s) <= kWidestRow;
}

void tile_conv(const TileTable& table, const ConvShape& given, const uint32_t* x, const uint32_t* blocked,
               const Epilogue& to) {
  ScratchScope scope;
  const ConvShape s = straightened(given);
  TilePlan plan{.shape = s, .table = table, .x = x, .blocked = blocked, .to = to, .padding = padded_pixel(s)};
  int64_t height = s.out_size(0), n_columns = ceil_div(s.group_outputs(), 16);
  Band whole = band_of(s, height);
  int64_t chunk_products = ceil_div(s.group_outputs(), 16) * static_cast<int64_t>(whole.chunks.size());
  int64_t products = s.batch * s.groups * ceil_div(whole.n_positions(s), kTileRows) * chunk_products;
  bool serial = products < kSerialProducts;
  // A band is so small that it stays in the cache, and with several threads there are some tasks for each:
  // first by cutting outputs, which unpacks activations again for each part, then by cutting bands, which
  // unpacks weights.
  int64_t wanted = serial || n_threads_of(pool()) == 1 ? 1 : kTasksPerThread * n_threads_of(pool());
  int64_t n_images = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(1, whole.image_bytes()), 1,
                                         std::max<int64_t>(1, ceil_div(s.batch, wanted)));
  int64_t ranges = ceil_div(s.batch, n_images) * s.groups;
  int64_t parts =
      std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(1, ranges)), 1, ceil_div(n_columns, 2));
  int64_t bands = std::max(ceil_div(whole.image_bytes(), kBandBytes),
                           ceil_div(wanted, std::max<int64_t>(1, ranges * parts)));
  int64_t rows = ceil_div(height, std::min(bands, height));
  Band even = band_of(s, rows), last = band_of(s, height - (ceil_div(height, rows) - 1) * rows);
  auto part = [&](int64_t i) { return std::min(n_columns, ceil_div(n_columns, 2) * i / parts * 2); };
  ScratchVector<TileTask> tasks;
  for (int64_t n = 0; n < s.batch; n += n_images) {
    for (int64_t row = 0; row < height; row += rows) {
      for (int64_t g = 0; g < s.groups; ++g) {
        for (int64_t i = 0; i < parts; ++i) {
          tasks.push_back({.band = row + rows > height ? &last : &even,
                           .first_image = n,
                           .n_images = std::min(n_images, s.batch - n),
                           .first_row = row,
                           .group = g,
                           .first_column = part(i),
                           .last_column = part(i + 1)});
        }
      }
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), serial,
                 [&](int64_t i) { run_tile_task(plan, tasks[static_cast<size_t>(i)]); });
}

}  // namespace bop2nd

// SPDX-License-Identifier: Apache-2.0
// Binary products on processors that multiply tiles of bytes (AMX): signs become bytes +1 and -1, padding and
// what lies behind the last channel become 0, and the product of two tiles is the dot product itself.
//
// Why not count bits: a tile product is 16 x 16 x 64 multiply-accumulates in 16 cycles, 1024 a cycle;
// counting (matmul.inl) does 512 in 1.28 cycles at best. Bits are unpacked into bytes in the caches: a few
// rows of an image, for all outputs; weights of 32 outputs, either all of them once (if they leave room in
// the nearest cache) or, in a ring of some chunks of 64, again for every 32 pixels. Memory holds and moves
// bits only.
//
// Order. A 32-bit word becomes 32 bytes: byte 4 t + k is bit 8 k + t. That is the order in which the bytes of
// 16 weight words lie in registers, so that a row of a weight tile (4 bytes for each of 16 outputs) takes one
// instruction: bit t of every byte, spread. Activations, which are unpacked once for all outputs, are
// permuted to it.
//
// Cost per 64 bytes: weights 1 operation and a store (and 1/8 of 2 to 5 more); activations 4 and a store.
//
// T is a vocabulary of tiles (vocabulary_amx.h): 8 tile registers of 16 x 64 bytes.
//
// Include inside a target region and an anonymous namespace within bop2nd.

// Words 0 .. n_words - 1 of n_pixels pixels, `x_stride` words apart, to 32 n_words bytes each, pixels
// `byte_stride` apart. Bytes that hold no channel become 0.
template <class T>
void tile_pixels(const TilePixels& p) {
  int64_t whole = p.n_words - (p.last_channels < kWordBits);
  uint32_t valid = T::ordered(low_bits(p.last_channels));
  bool side_by_side = p.x_stride == p.n_words && p.byte_stride == 32 * p.n_words && whole == p.n_words;
  int64_t n_runs = side_by_side ? 1 : p.n_pixels, run = side_by_side ? p.n_pixels * whole : whole;
  for (int64_t i = 0; i < n_runs; ++i) {
    const uint32_t* x = p.x + i * p.x_stride;
    int8_t* to = p.bytes + i * p.byte_stride;
    int64_t w = 0;
    for (; w + 2 <= run; w += 2) T::store_pixels(to + 32 * w, x + w);
    if (w < run) T::store_pixel(to + 32 * w, x[w], ~0u), ++w;
    if (w < p.n_words && !side_by_side) T::store_pixel(to + 32 * w, x[w], valid);
  }
}

template <class T>
void tile_order_bytes(int8_t* bytes, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) T::order_bytes(bytes + i);
}

// One word of 16 outputs: 8 rows of a weight tile.
template <class T>
BOP2ND_INLINE void tile_word(typename T::Words words, int8_t* rows) {
  T::template store_row<0>(rows, words), T::template store_row<1>(rows, words);
  T::template store_row<2>(rows, words), T::template store_row<3>(rows, words);
  T::template store_row<4>(rows, words), T::template store_row<5>(rows, words);
  T::template store_row<6>(rows, words), T::template store_row<7>(rows, words);
}

// One word of the weights of 16 or 32 outputs, out of a block as prepack_weight lays it: half of each tile.
template <class T, int L, int kColumns>
BOP2ND_INLINE void tile_weight_word(const uint32_t* w, int column, int8_t* to) {
  using W = typename T::Words;
  if constexpr (L == 32) {
    tile_word<T>(T::load_words(w), to);
  } else {
    W a = T::load_words(w), b = T::bit_xor(a, T::load_words(w + 16));  // odd steps are paired: weights_paired
    if constexpr (L == 8) {
      W c = T::load_words(w + 32), d = T::bit_xor(c, T::load_words(w + 48));
      bool low = column < 2;
      a = low ? T::low_bytes(a, b) : T::high_bytes(a, b);
      b = low ? T::low_bytes(c, d) : T::high_bytes(c, d);
    }
    if constexpr (kColumns == 2) {
      tile_word<T>(T::low_halves(a, b), to);
      tile_word<T>(T::high_halves(a, b), to + kTileBytes);
    } else {
      tile_word<T>(column % 2 == 0 ? T::low_halves(a, b) : T::high_halves(a, b), to);
    }
  }
}

// For `emit`: what a product leaves are dots already.
struct TileDots : Avx512Count {
  BOP2ND_INLINE static I dot(I, I sum) { return sum; }
};

// Some columns of a block of outputs, by all pixels.
struct TileColumns {
  const TileWork& work;
  const uint32_t* w;  // of the block
  int in_block;       // number of the first column in it
  int64_t column;     // in the group
};

// One chunk of the weights, as kColumns tiles. A chunk of one word is filled up with zeros.
template <class T, int L, int kColumns>
BOP2ND_INLINE void tile_weights(const TileColumns& p, int64_t c, int8_t* tiles) {
  constexpr int64_t kWordSteps = 16 * 32 / L;
  const TileChunk& chunk = p.work.chunks[c];
  const uint32_t* word = p.w + chunk.first_word * kWordSteps;
  tile_weight_word<T, L, kColumns>(word, p.in_block, tiles);
  tiles += kTileBytes / 2;
  if (chunk.n_words == 2) return tile_weight_word<T, L, kColumns>(word + kWordSteps, p.in_block, tiles);
  for (int v = 0; v < kColumns; ++v) T::store_zeros(tiles + v * kTileBytes);
}

// Asks for the memory that a product's values go to while its tiles multiply. Prefetches are hints: for two
// columns and for values of 2 bytes some of them are for nothing.
struct FetchOutput {
  const int64_t *pixel, *end;
  float* values;
  int64_t all_outputs, at_once;

  FetchOutput(const TileWork& work, int64_t t, int64_t rows, int64_t column)
      : pixel(work.out_pixel + t * kTileRows),
        end(pixel + rows * kTileRows),
        values(work.sums ? nullptr : static_cast<float*>(work.to->values) + work.first_output + 16 * column),
        all_outputs(work.all_outputs),
        at_once((rows * kTileRows - 1) / work.n_chunks + 1) {
    if (work.sums || !work.to->values || work.to->dtype != Dtype::kFloat32) end = pixel;
  }
  BOP2ND_INLINE void some() {
    for (int64_t i = 0; i < at_once && pixel < end; ++i, ++pixel)
      __builtin_prefetch(values + (*pixel < 0 ? 0 : *pixel) * all_outputs, 1);
  }
};

// kRows tiles of pixels, from number t on, by kColumns of outputs; dots: [kColumns, 16 kRows, 16]. Tile
// registers: sums in 0..3, column by column, pixels in 4 and 5, weights in 6 and 7. kRing: weights are
// unpacked into bytes kTileRing - 1 chunks before they are multiplied; else all of them have been.
template <class T, int L, int kRows, int kColumns, bool kRing>
void tile_products(const TileColumns& p, int64_t t, int32_t* dots) {
  constexpr int kSums = kRows * kColumns;
  const TileWork& work = p.work;
  const int8_t* x[kRows];
  for (int i = 0; i < kRows; ++i) x[i] = work.x + work.x_offset[t + i];
  FetchOutput output(work, t, kRows, p.column);
  int64_t stride = work.pixel_bytes, n_chunks = work.n_chunks;
  constexpr int64_t kChunkBytes = kColumns * kTileBytes;
  if constexpr (kRing) {
    for (int64_t c = 0; c < kTileRing - 1 && c < n_chunks; ++c)
      tile_weights<T, L, kColumns>(p, c, work.tiles + c * kChunkBytes);
  }
  T::template zero<0>();
  if constexpr (kSums > 1) T::template zero<1>();
  if constexpr (kSums > 2) T::template zero<2>();
  if constexpr (kSums > 3) T::template zero<3>();
  for (int64_t c = 0; c < n_chunks; ++c) {
    int64_t at = work.chunks[c].x_offset;
    const int8_t* w = work.tiles + (kRing ? c % kTileRing : c) * kChunkBytes;
    T::template load_tile<6>(w, 64);
    T::template load_tile<4>(x[0] + at, stride);
    T::template multiply<0, 4, 6>();
    if constexpr (kRows > 1) {
      T::template load_tile<5>(x[1] + at, stride);
      T::template multiply<1, 5, 6>();
    }
    if constexpr (kColumns == 2) {
      T::template load_tile<7>(w + kTileBytes, 64);
      T::template multiply<kRows, 4, 7>();
      if constexpr (kRows == 2) T::template multiply<3, 5, 7>();
    }
    if constexpr (kRows > 2) {
      T::template load_tile<4>(x[2] + at, stride);
      T::template multiply<2, 4, 6>();
    }
    if constexpr (kRows > 3) {
      T::template load_tile<5>(x[3] + at, stride);
      T::template multiply<3, 5, 6>();
    }
    output.some();
    if constexpr (kRing) {
      int64_t next = c + kTileRing - 1;
      if (next < n_chunks) tile_weights<T, L, kColumns>(p, next, work.tiles + next % kTileRing * kChunkBytes);
    }
  }
  T::template store_tile<0>(dots);
  if constexpr (kSums > 1) T::template store_tile<1>(dots + kTileBytes / 4);
  if constexpr (kSums > 2) T::template store_tile<2>(dots + 2 * kTileBytes / 4);
  if constexpr (kSums > 3) T::template store_tile<3>(dots + 3 * kTileBytes / 4);
}

inline void emit_tiles(const TileColumns& p, int64_t t, int64_t rows, int columns, const int32_t* dots) {
  const TileWork& work = p.work;
  if (work.sums) {
    for (int i = 0; i < columns; ++i) {
      for (int64_t row = 0; row < rows * kTileRows; ++row, dots += 16) {
        int32_t* to = work.sums + (t * kTileRows + row) * work.sum_stride;
        std::memcpy(to + 16 * (p.column + i - work.first_column), dots, 64);
      }
    }
    return;
  }
  for (int i = 0; i < columns; ++i) {
    int64_t o = 16 * (p.column + i);
    MatmulTile m{};
    m.counts = reinterpret_cast<const uint32_t*>(dots + i * rows * kTileRows * 16);
    m.n_pixels = rows * kTileRows;
    m.out_pixel = work.out_pixel + t * kTileRows;
    m.first_output = work.first_output + o, m.all_outputs = work.all_outputs;
    m.n_outputs = static_cast<int>(std::min<int64_t>(16, work.outputs - o));
    emit<TileDots>(m, *work.to);
  }
}

// A product, and its dots emitted. `rows` tiles of pixels, up to 4 for one column without the ring, else up
// to 2.
template <class T, int L, int kColumns, bool kRing>
void multiply_and_emit(const TileColumns& p, int64_t t, int64_t rows) {
  alignas(64) int32_t dots[kTileBytes];
  if (rows == 1) tile_products<T, L, 1, kColumns, kRing>(p, t, dots);
  if (rows == 2) tile_products<T, L, 2, kColumns, kRing>(p, t, dots);
  if constexpr (kColumns == 1 && !kRing) {
    if (rows == 3) tile_products<T, L, 3, 1, kRing>(p, t, dots);
    if (rows == 4) tile_products<T, L, 4, 1, kRing>(p, t, dots);
  }
  emit_tiles(p, t, rows, kColumns, dots);
}

// Tiles t up to `end` of pixels: with the ring at most 2, without it the weights are unpacked once for all.
template <class T, int L, int kColumns>
void tile_columns(const TileColumns& p, int64_t t, int64_t end) {
  constexpr int64_t kMost = kColumns == 2 ? 2 : 4;
  if (p.work.ring) return multiply_and_emit<T, L, kColumns, true>(p, t, end - t);
  for (int64_t c = 0; c < p.work.n_chunks; ++c)
    tile_weights<T, L, kColumns>(p, c, p.work.tiles + c * kColumns * kTileBytes);
  for (; t < end; t += kMost) multiply_and_emit<T, L, kColumns, false>(p, t, std::min(kMost, end - t));
}

// Tiles t up to `end` of pixels by all columns.
template <class T>
void tile_rows(const TileWork& work, int64_t t, int64_t end) {
  for (int64_t first = 0, last; first < work.last_column; first = last) {  // columns of a block
    int lane_bits = lane_bits_for(work.outputs - 16 * first);
    last = first + 32 / lane_bits;
    int64_t v = std::max(first, work.first_column), stop = std::min(last, work.last_column);
    for (; v < stop; v += 2) {
      TileColumns p{.work = work,
                    .w = work.w + 16 * first * work.row_words,
                    .in_block = static_cast<int>(v - first),
                    .column = v};
      bool two = stop - v > 1;
      if (lane_bits == 8) two ? tile_columns<T, 8, 2>(p, t, end) : tile_columns<T, 8, 1>(p, t, end);
      if (lane_bits == 16) two ? tile_columns<T, 16, 2>(p, t, end) : tile_columns<T, 16, 1>(p, t, end);
      if (lane_bits == 32) tile_columns<T, 32, 1>(p, t, end);
    }
  }
}

template <class T>
void tile_multiply(const TileWork& work) {
  T::configure();
  int64_t at_once = work.ring ? 2 : work.n_tiles;
  for (int64_t t = 0; t < work.n_tiles; t += at_once)
    tile_rows<T>(work, t, std::min(t + at_once, work.n_tiles));
  T::release();
}

// The yardstick of tile_multiply: its products and loads, on operands in the nearest cache. They are +1 and
// -1: zeros were multiplied a fifth faster when timed by hand.
template <class T>
double tile_register_loop(int64_t iterations) {
  constexpr int64_t kChunks = 64;
  alignas(64) int8_t operands[2 * kTileBytes];
  alignas(64) int32_t dots[kTileBytes / 4];
  for (int64_t i = 0; i < 2 * kTileBytes; ++i) operands[i] = i * 2654435761u >> 7 & 1 ? -1 : 1;
  T::configure();
  T::template zero<0>(), T::template zero<1>(), T::template zero<2>(), T::template zero<3>();
  for (int64_t i = 0; i < iterations * kChunks; ++i) {
    T::template load_tile<4>(operands, 64);
    T::template load_tile<6>(operands, 64);
    T::template multiply<0, 4, 6>();
    T::template load_tile<5>(operands + kTileBytes, 64);
    T::template multiply<1, 5, 6>();
    T::template load_tile<7>(operands + kTileBytes, 64);
    T::template multiply<2, 4, 7>();
    T::template multiply<3, 5, 7>();
  }
  T::template store_tile<0>(dots);
  T::release();
  return static_cast<double>(iterations * kChunks) * 4 * 16 * 16 * 64;
}

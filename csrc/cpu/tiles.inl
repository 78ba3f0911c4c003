// SPDX-License-Identifier: Apache-2.0
// Binary products on processors that multiply tiles of bytes (AMX): signs become bytes +1 and -1, padding and
// what lies behind the last channel become 0, and the product of two tiles is the dot product itself.
//
// Why not count bits: a tile product is 16 x 16 x 64 multiply-accumulates in 16 cycles, 1024 a cycle; counting
// (matmul.inl) does 512 in 1.28 cycles at best. Bits are turned into bytes in the caches, a few rows of an image and
// the weights of 64 outputs at a time; memory holds and moves bits only.
//
// Order. A 32-bit word becomes 32 bytes: byte 4 t + k is bit 8 k + t. That is the order in which the bytes of 16
// weight words lie in registers, so that a row of a weight tile (4 bytes for each of 16 outputs) takes one
// instruction: bit t of every byte, spread. Activations, which are turned once for all outputs, are permuted to it.
//
// Cost per 64 bytes: weights 1 operation and a store (and 1/8 of 2 to 3 more); activations 4 and a store.
//
// T is a vocabulary of tiles (vocabulary_amx.h): 8 tile registers of 16 x 64 bytes.
//
// Include inside a target region and an anonymous namespace within bop2nd.

// Words 0 .. n_words - 1 of n_pixels pixels, `x_stride` words apart, to 32 n_words bytes each, pixels
// `byte_stride` apart. `last_word`: which bytes of each pixel's last word hold channels, in the order above.
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

// One word of 16 outputs: 8 rows of a weight tile.
template <class T>
BOP2ND_INLINE void tile_word(typename T::Words words, int8_t* rows) {
  T::template store_row<0>(rows, words), T::template store_row<1>(rows, words);
  T::template store_row<2>(rows, words), T::template store_row<3>(rows, words);
  T::template store_row<4>(rows, words), T::template store_row<5>(rows, words);
  T::template store_row<6>(rows, words), T::template store_row<7>(rows, words);
}

// Weight words as block_weight lays them, to tiles: chunk c of outputs 16 v .. 16 v + 15 starts at
// tiles + kTileBytes * (c * n_columns + v). A chunk of one word is filled up with zeros.
template <class T>
void tile_weights(const TileWeights& t) {
  using W = typename T::Words;
  int n_columns = kWordBits / t.lane_bits;
  for (int64_t c = 0; c < t.n_chunks; ++c) {
    int8_t* chunk = t.tiles + c * n_columns * kTileBytes;
    for (int half = 0; half < 2; ++half) {
      int8_t* to = chunk + half * kTileBytes / 2;
      if (half >= t.chunks[c].n_words) {
        for (int v = 0; v < n_columns; ++v) T::store_zeros(to + v * kTileBytes);
        continue;
      }
      const uint32_t* w = t.w + (t.chunks[c].first_word + half) * 16 * n_columns;
      if (t.lane_bits == 32) {
        tile_word<T>(T::load_words(w), to);
        continue;
      }
      W a = T::load_words(w), b = T::bit_xor(a, T::load_words(w + 16));  // odd steps are paired: weights_paired
      if (t.lane_bits == 16) {
        tile_word<T>(T::low_halves(a, b), to);
        tile_word<T>(T::high_halves(a, b), to + kTileBytes);
        continue;
      }
      W d = T::load_words(w + 32), e = T::bit_xor(d, T::load_words(w + 48));
      W low_first = T::low_bytes(a, b), low_second = T::low_bytes(d, e);
      W high_first = T::high_bytes(a, b), high_second = T::high_bytes(d, e);
      tile_word<T>(T::low_halves(low_first, low_second), to);
      tile_word<T>(T::high_halves(low_first, low_second), to + kTileBytes);
      tile_word<T>(T::low_halves(high_first, high_second), to + 2 * kTileBytes);
      tile_word<T>(T::high_halves(high_first, high_second), to + 3 * kTileBytes);
    }
  }
}

// kRows x kColumns tiles of results at once: 4 products for 4 loads where both are 2.
template <class T, int kRows, int kColumns>
BOP2ND_INLINE void tile_products(const TileProduct& p) {
  int64_t x_stride = p.pixel_bytes, chunk_bytes = p.n_columns * kTileBytes;
  const int8_t *first = p.x + p.x_offset[0], *second = p.x + p.x_offset[kRows - 1], *w = p.w;
  T::template zero<0>();
  if constexpr (kColumns == 2) T::template zero<1>();
  if constexpr (kRows == 2) T::template zero<2>();
  if constexpr (kRows == 2 && kColumns == 2) T::template zero<3>();
  for (int64_t c = 0; c < p.n_chunks; ++c, w += chunk_bytes) {
    int64_t at = p.chunks[c].x_offset;
    T::template load_tile<4>(first + at, x_stride);
    T::template load_tile<6>(w, 64);
    T::template multiply<0, 4, 6>();
    if constexpr (kRows == 2) {
      T::template load_tile<5>(second + at, x_stride);
      T::template multiply<2, 5, 6>();
    }
    if constexpr (kColumns == 2) {
      T::template load_tile<7>(w + kTileBytes, 64);
      T::template multiply<1, 4, 7>();
      if constexpr (kRows == 2) T::template multiply<3, 5, 7>();
    }
  }
  T::template store_tile<0>(p.dots);
  if constexpr (kRows == 2) T::template store_tile<2>(p.dots + kTileBytes / 4);
  if constexpr (kColumns == 2) T::template store_tile<1>(p.dots + kRows * kTileBytes / 4);
  if constexpr (kRows == 2 && kColumns == 2) T::template store_tile<3>(p.dots + 3 * kTileBytes / 4);
}

template <class T>
void tile_product(const TileProduct& p) {
  if (p.rows == 2) return p.columns == 2 ? tile_products<T, 2, 2>(p) : tile_products<T, 2, 1>(p);
  return p.columns == 2 ? tile_products<T, 1, 2>(p) : tile_products<T, 1, 1>(p);
}

// For `emit`: what a product leaves are dots already.
struct TileDots : Avx512Count {
  BOP2ND_INLINE static I dot(I, I sum) { return sum; }
};

// The yardstick of tile_product: the same instructions on operands in the nearest cache.
template <class T>
double tile_register_loop(int64_t iterations) {
  alignas(64) static const int8_t operands[4 * kTileBytes] = {};
  alignas(64) static thread_local int32_t dots[kTileBytes];
  constexpr int64_t kChunks = 64;
  static const TileChunk chunks[kChunks] = {};
  int64_t offsets[2] = {0, kTileBytes};
  TileProduct p{operands, 64, offsets, chunks, kChunks, operands, 0, 2, 2, dots};
  T::configure();
  for (int64_t i = 0; i < iterations; ++i) tile_product<T>(p);
  T::release();
  return static_cast<double>(iterations * kChunks) * 4 * 16 * 16 * 64;
}

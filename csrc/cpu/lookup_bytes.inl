// SPDX-License-Identifier: Apache-2.0
// Binary dot products by table lookups, as in lookup.inl, for vectors of 16 bytes that shift and add bytes
// (NEON). Counting (count_bytes.inl) takes 3.25 instructions for 128 bits, lookups 2.33: they pay
// where TBL is a single operation (Cortex-A76 and later; A57 and A72 make three of it).
//
// The table of two pixels has popcount(a ^ w) + 16 popcount(b ^ w) for 4 bits w of the weights. A window v is
// the sum of three; p is the sum of v and q that of v >> 4, an instruction each: of b the sum is q, of a it
// is p - 16 q, modulo 256, up to 21 windows. Seven operations a window: three lookups, four additions.
//
// Two pairs of pixels and up to four vectors of outputs at a time, so that loads do not limit: 24 of them for
// 56 operations (O = 4); 16 registers hold p and q, 6 the tables.
//
// Include inside an anonymous namespace within bop2nd, after matmul.inl.

#include "pair_tables.inl"

// A word of the weights: for each nibble O vectors, a byte an output.
template <class T, int O>
BOP2ND_INLINE void unpack_byte_nibbles(const uint32_t* w, uint8_t* to) {
  typename T::I before[4];
  for (int s = 0; s < O; ++s, w += 16) {
    typename T::I slice[4];
    for (int l = 0; l < 4; ++l) {
      slice[l] = T::load(w + 4 * l);
      if (s % 2) slice[l] = T::bit_xor(slice[l], before[l]);  // weights_paired
      before[l] = slice[l];
    }
    for (int byte = 0; byte < 4 / O; ++byte) {  // O = 2: 16 bits of an output
      for (int o = 0; o < O; ++o, to += T::kBytes) {
        typename T::Bytes part = O == 4      ? T::as_bytes(slice[o])
                                 : byte == 0 ? T::low_bytes(slice[2 * o % 4], slice[(2 * o + 1) % 4])
                                             : T::high_bytes(slice[2 * o % 4], slice[(2 * o + 1) % 4]);
        T::store_bytes(to, T::low_nibbles(part));
        T::store_bytes(to + O * T::kBytes, T::high_nibbles(part));
      }
      to += O * T::kBytes;
    }
  }
}

template <class T, int O>
void lay_byte_panel(const CountTile& t, int64_t word, int64_t n_words, uint8_t* to) {
  for (int64_t k = word; k < word + n_words; ++k, to += kNibblesPerWord * O * T::kBytes)
    unpack_byte_nibbles<T, O>(t.w + (t.w_contiguous ? k : t.w_offset[k]) * 16 * O, to);
  for (int i = 0; i < kWindow * O; ++i) T::store_bytes(to + i * T::kBytes, T::no_bytes());  // a window
}

// Counts of pixels, 2 Q of them, by O vectors of outputs.
template <class T, int O, int Q>
struct PairCounts {
  typename T::template Wide<8> of[2 * Q][O];

  BOP2ND_INLINE void clear() {
    for (auto& pixel : of) {
      for (auto& wide : pixel) T::clear(wide);
    }
  }
};

// Up to kMaxWindows windows of Q pairs of pixels, x_stride apart, and O vectors of outputs.
template <class T, int O, int Q>
BOP2ND_INLINE void look_up_windows(const uint16_t* x, int64_t x_stride, const uint8_t* panel,
                                   int64_t n_windows, PairCounts<T, O, Q>& counts) {
  using Bytes = typename T::Bytes;
  const char* tables = reinterpret_cast<const char*>(kPairTables.entry);
  Bytes p[Q][O], q[Q][O];
#pragma GCC unroll 2
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) p[i][o] = q[i][o] = T::no_bytes();
  }
  for (; n_windows > 0; --n_windows, x += kWindow, panel += kWindow * O * T::kBytes) {
    Bytes table[Q][kWindow];
#pragma GCC unroll 2
    for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 3
      for (int g = 0; g < kWindow; ++g) table[i][g] = T::load_bytes(tables + x[i * x_stride + g]);
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      Bytes v[Q];
#pragma GCC unroll 3
      for (int g = 0; g < kWindow; ++g) {
        Bytes w = T::load_bytes(panel + (g * O + o) * T::kBytes);
#pragma GCC unroll 2
        for (int i = 0; i < Q; ++i) {
          Bytes found = T::look_up(table[i][g], w);
          v[i] = g == 0 ? found : T::add_bytes(v[i], found);
        }
      }
#pragma GCC unroll 2
      for (int i = 0; i < Q; ++i)
        p[i][o] = T::add_bytes(p[i][o], v[i]), q[i][o] = T::add_high_nibbles(q[i][o], v[i]);
      T::order(panel, q[Q - 1][o]);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      T::add_to(counts.of[2 * i][o], T::less_16(p[i][o], q[i][o]));
      T::add_to(counts.of[2 * i + 1][o], q[i][o]);
    }
  }
}

template <class T, int O, int Q>
BOP2ND_INLINE void look_up(const uint16_t* x, int64_t x_stride, const uint8_t* panel, int64_t n_windows,
                           PairCounts<T, O, Q>& counts) {
  counts.clear();
  for (; n_windows > 0; n_windows -= kMaxWindows) {
    look_up_windows<T, O, Q>(x, x_stride, panel, std::min<int64_t>(n_windows, kMaxWindows), counts);
    x += kMaxWindows * kWindow, panel += kMaxWindows * kWindow * O * T::kBytes;
  }
}

// Counts of the Q pairs of pixels from `first` on by one panel, from word number `word` on, to memory.
template <class T, int O, int Q>
void multiply_byte_panel(const CountTile& t, int64_t first, int64_t word, int64_t n_words,
                         const uint8_t* panel) {
  int64_t stride = pair_stride(t.x_words), n_windows = (n_words * kNibblesPerWord + kWindow - 1) / kWindow;
  const uint16_t* x = reinterpret_cast<const uint16_t*>(t.x) + first / 2 * stride + word * kNibblesPerWord;
  PairCounts<T, O, Q> counts;
  look_up<T, O, Q>(x, stride, panel, n_windows, counts);
  int64_t last = std::min<int64_t>(t.n_pixels, first + 2 * Q);
  for (int64_t pixel = first; pixel < last; ++pixel) {
    for (int o = 0; o < O; ++o) {
      typename T::I count[4];
      T::widen(counts.of[pixel - first][o], count);
      for (int i = 0; i < 4; ++i) {
        // O = 4: four of every 16 outputs; O = 2: four of 16 outputs and of 16 more, then the four that
        // follow.
        int v = O == 4 ? i : i % 2, lane = 4 * (O == 4 ? o : 2 * o + i / 2);
        uint32_t* to = t.counts + (v * t.n_pixels + pixel) * 16 + lane;
        T::store_int(to, word > 0 ? T::add(count[i], T::load(to)) : count[i]);
      }
    }
  }
}

template <class T, int O>
void multiply_byte_pairs(const CountTile& t) {
  alignas(64) uint8_t panel[(kPanelNibbles + kWindow) * O * T::kBytes];
  int64_t words = std::max<int64_t>(1, t.n_words), n_stretches = (words + kPanelWords - 1) / kPanelWords;
  int64_t stretch = ((words + n_stretches - 1) / n_stretches + kWindow - 1) / kWindow * kWindow;
  for (int64_t word = 0; word == 0 || word < t.n_words; word += stretch) {
    int64_t n = std::min(stretch, t.n_words - word), pixel = 0;
    lay_byte_panel<T, O>(t, word, n, panel);
    for (; pixel + 2 < t.n_pixels; pixel += 4) multiply_byte_panel<T, O, 2>(t, pixel, word, n, panel);
    if (pixel < t.n_pixels) multiply_byte_panel<T, O, 1>(t, pixel, word, n, panel);
  }
}

template <class T>
void pack_pixels_for_bytes(const PixelTile& t) {
  lookups_pay(t.n_pixels, t.lane_bits) ? pack_pixel_pairs<T>(t) : pack_pixels<T>(t);
}

template <class T>
void multiply_by_bytes(const CountTile& t, const MatmulTile& block, const Epilogue& e) {
  if (!lookups_pay(t.n_pixels, t.lane_bits)) return multiply<T>(t, block, e);
  t.lane_bits == 8 ? multiply_byte_pairs<T, 4>(t) : multiply_byte_pairs<T, 2>(t);
  emit_block<T>(block, e);
}

// The yardstick of multiply_by_bytes (see yardsticks.inl): a whole panel, again and again.
template <class T>
double byte_lookup_loop(int64_t iterations) {
  constexpr int kOutputs = 4, kPairs = 2;
  alignas(64) uint8_t panel[kPanelNibbles * kOutputs * T::kBytes];
  uint16_t x[kPairs * kPanelNibbles];
  for (int i = 0; i < kPanelNibbles * kOutputs * T::kBytes; ++i)
    panel[i] = static_cast<uint8_t>(i * 37 >> 3 & 15);
  for (int i = 0; i < kPairs * kPanelNibbles; ++i) x[i] = static_cast<uint16_t>(16 * (i * 89 & 255));
  for (int64_t i = 0; i < iterations; ++i) {
    PairCounts<T, kOutputs, kPairs> counts;
    look_up<T, kOutputs, kPairs>(x, kPanelNibbles, panel, kPanelNibbles / kWindow, counts);
    for (auto& pixel : counts.of) {
      for (auto& wide : pixel) T::keep_in_register(wide.sum[0]), T::keep_in_register(wide.sum[1]);
    }
  }
  return static_cast<double>(iterations) * kPanelNibbles * 4 * 2 * kPairs * kOutputs * T::kBytes;
}

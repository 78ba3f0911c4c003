// SPDX-License-Identifier: Apache-2.0
// Binary dot products by table lookups, for vectors that have neither a popcount nor three-input logic
// (AVX2): counting in bit planes (matmul.inl) takes 5.5 operations per 256 bits there, lookups 2.7.
//
// A nibble is 4 bits of a sum. The activations of two pixels, a and b, choose a table of 16 bytes: entry w is
// popcount(a ^ w) + 16 popcount(b ^ w). A shuffle looks up the weights of 32 outputs in it: 256 bits counted.
// Three nibbles (a window) are added, 3 * 4 < 16, before the halves of the bytes are told apart.
//
//   words      |    word k     |   word k + 1  |   word k + 2  |
//   nibbles    |0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|
//   windows     [   ] [   ] [   ] [   ] [   ] [   ] [   ] [   ]
//
// Telling them apart. Two sums are kept of windows v: P of v and Q of v >> 4, a shift of 16-bit lanes, which
// carries 16 a of the odd byte into the even one. In bytes, modulo 256, with the sums a0, b0 of the even byte
// and a1, b1 of the odd one, each below 256:
//   P = (a0 + 16 b0, a1 + 16 b1),  Q = (b0 + 16 a1, b1):  b1, a1, b0 and a0 follow in this order.
//
// Operations per window: 3 lookups, 2 and 3 for the sums; 15 more every 21 windows. Two pairs of pixels at a
// time would share the loads of weights, but 16 registers do not hold their sums: convolutions took 10 %
// longer (tried by hand).
//
// T is a vocabulary of vectors of 32 bytes (Avx2Lookup) on top of one of matmul.inl, which counts what does
// not pay here: fewer than 4 pixels, blocks of 16 outputs. Include inside a target region and an anonymous
// namespace within bop2nd, after matmul.inl.

#include "pair_tables.inl"

// A word of the weights: for each nibble one vector of 32 outputs (O = 1) or two (O = 2), a byte an output.
template <class T, int O>
BOP2ND_INLINE void unpack_nibbles(const uint32_t* w, uint8_t* to) {
  constexpr int kSlices = 2 * O;  // of 64 bytes
  typename T::I slice[kSlices][2];
  for (int s = 0; s < kSlices; ++s) {
    for (int half = 0; half < 2; ++half) {
      slice[s][half] = T::load(w + 16 * s + 8 * half);
      if (s % 2) slice[s][half] = T::bit_xor(slice[s][half], slice[s - 1][half]);  // weights_paired
    }
  }
  for (int s = 0; s < kSlices; ++s) {
    typename T::I first = slice[s][0], second = slice[s][1];
    if constexpr (O == 1) {  // 16 bits of an output: their low and high bytes
      first = T::low_bytes(slice[s][0], slice[s][1]), second = T::high_bytes(slice[s][0], slice[s][1]);
    }
    uint8_t *to_first = to + 4 * s * T::kBytes, *to_second = to_first + (O == 1 ? 2 : 1) * T::kBytes;
    T::store(to_first, T::low_nibbles(first)), T::store(to_first + O * T::kBytes, T::high_nibbles(first));
    T::store(to_second, T::low_nibbles(second)), T::store(to_second + O * T::kBytes, T::high_nibbles(second));
  }
}

template <class T, int O>
void lay_panel(const CountTile& t, int64_t word, int64_t n_words, uint8_t* to) {
  for (int64_t k = word; k < word + n_words; ++k, to += kNibblesPerWord * O * T::kBytes) {
    int64_t from = t.w_contiguous ? k : t.w_offset[k];
    unpack_nibbles<T, O>(t.w + from * 32 * O, to);
  }
  for (int i = 0; i < kWindow * O; ++i) T::store(to + i * T::kBytes, T::zero());  // to fill a window
}

// Sums of bytes in 16-bit lanes: `both` of even + 256 odd bytes, modulo 65536, and `odd` of the odd ones.
template <class T>
struct WideSum {
  typename T::I both, odd;

  BOP2ND_INLINE void clear() { both = odd = T::zero(); }
  BOP2ND_INLINE void add(typename T::I bytes) {
    both = T::add_halves(both, bytes);
    odd = T::add_halves(odd, T::template shift_right<8>(bytes));
  }
  BOP2ND_INLINE typename T::I even() const { return T::sub_halves(both, T::template shift_left<8>(odd)); }
};

// Counts of two pixels, a and b, of one vector of outputs.
template <class T>
struct PairSum {
  WideSum<T> a, b;

  BOP2ND_INLINE void clear() { a.clear(), b.clear(); }
  BOP2ND_INLINE void add(typename T::I p, typename T::I q) {
    typename T::I odd = T::set_halves(0xFF00), nibble = T::set_halves(0x00F0);
    p = T::sub_halves(p, T::template shift_left<4>(T::bit_and(q, odd)));
    q = T::sub_bytes(q, T::bit_and(T::template shift_right<4>(p), nibble));
    p = T::sub_bytes(p, T::bit_and(T::template shift_left<4>(q), nibble));
    a.add(p), b.add(q);
  }
};

// Windows of two pixels in the tables `x` and O vectors of outputs in the panel.
template <class T, int O>
BOP2ND_INLINE void look_up(const uint16_t* x, const uint8_t* panel, int64_t n_windows,
                           PairSum<T> (&sums)[O]) {
  const uint8_t* tables = kPairTables.entry[0];
  for (int o = 0; o < O; ++o) sums[o].clear();
  while (n_windows > 0) {
    typename T::I p[O], q[O];
    for (int o = 0; o < O; ++o) p[o] = q[o] = T::zero();
    int64_t round = std::min<int64_t>(n_windows, kMaxWindows);
    n_windows -= round;
#pragma GCC unroll 4
    for (; round > 0; --round, x += kWindow, panel += kWindow * O * T::kBytes) {
      typename T::I v[O];
#pragma GCC unroll 3
      for (int g = 0; g < kWindow; ++g) {
        typename T::I table = T::load_table(tables + 8 * static_cast<size_t>(x[g]));
#pragma GCC unroll 2
        for (int o = 0; o < O; ++o) {
          typename T::I found = T::look_up(table, panel + (g * O + o) * T::kBytes);
          v[o] = g == 0 ? found : T::add_bytes(v[o], found);
        }
      }
#pragma GCC unroll 2
      for (int o = 0; o < O; ++o) {
        p[o] = T::add_bytes(p[o], v[o]);
        q[o] = T::add_bytes(q[o], T::template shift_right<4>(v[o]));
      }
    }
    for (int o = 0; o < O; ++o) sums[o].add(p[o], q[o]);
  }
}

// What becomes of the counts of pixels: counts in memory, the dots as fp32 values, their bits by thresholds,
// or all that an epilogue can say with values in fp32.
enum class Sink { kCounts, kDots, kBits, kComputed };

// A copy of what tile and epilogue say: fields in memory would be read again after every store. kWhole: no
// vector of outputs is cut short.
template <class T, int O, Sink kSink, bool kWhole>
struct PairSink {
  uint32_t* counts;
  Epilogue e;
  const int64_t* out_pixel;
  int64_t n_pixels, first_output, all_outputs;
  int n_outputs;
  typename T::I bias;
  bool add;  // the counts of the words before

  BOP2ND_INLINE PairSink(const CountTile& t, const MatmulTile& block, const Epilogue& epilogue,
                         bool add_before)
      : counts(t.counts),
        e(epilogue),
        out_pixel(block.out_pixel),
        n_pixels(t.n_pixels),
        first_output(block.first_output),
        all_outputs(block.all_outputs),
        n_outputs(block.n_outputs),
        bias(T::set1(static_cast<uint32_t>(block.bias))),
        add(add_before) {}

  // Values and residual would be waited for, all lines at once: they are asked for before the pixels are
  // counted.
  BOP2ND_INLINE void fetch(int64_t pixel) const {
    if constexpr (kSink == Sink::kCounts || kSink == Sink::kBits) return;
    int64_t at = out_pixel[pixel] * all_outputs + first_output;
    if (e.values) fetch_lines<1>(static_cast<const float*>(e.values) + at);
    if (kSink == Sink::kComputed && e.residual) fetch_lines<0>(static_cast<const float*>(e.residual) + at);
  }
  template <int kToWrite>
  BOP2ND_INLINE static void fetch_lines(const float* values) {
    uintptr_t at = reinterpret_cast<uintptr_t>(values);  // lines past the end do no harm
#pragma GCC unroll 4
    for (uintptr_t i = 0; i < 4 * 32 * O; i += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(at + i), kToWrite);
  }

  // Output number `o` of the block, and those that follow in a vector. Returns their sign bits.
  BOP2ND_INLINE uint32_t emit(int64_t pixel, int o, typename T::I count) const {
    int n = kWhole ? T::kLanes : n_outputs - o;
    typename T::I dot = T::dot(bias, count);
    int64_t channel = first_output + o;
    if constexpr (kSink == Sink::kBits) return T::less(dot, e.threshold + channel, n);
    int64_t at = out_pixel[pixel] * all_outputs + channel;
    if constexpr (kSink == Sink::kComputed) return compute_lanes<T, float, false>(e, dot, at, channel, n);
    T::Lanes::store(static_cast<float*>(e.values) + at, T::real(dot), n);
    return 0;
  }

  // The counts of the first or second pixel of a pair.
  template <WideSum<T> PairSum<T>::* kOf>
  BOP2ND_INLINE void finish(int64_t pixel, const PairSum<T> (&sums)[O]) const {
    uint32_t bits[2 * O] = {};  // of 16 outputs
#pragma GCC unroll 2
    for (int o = 0; o < O; ++o) {
      const WideSum<T>& sum = sums[o].*kOf;
      typename T::I even = sum.even(), count[4];
      T::widen(T::unpack_low(even, sum.odd), count[0], count[1]);
      T::widen(T::unpack_high(even, sum.odd), count[2], count[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // O = 2: half of every 16 outputs; O = 1: the first half of both 16, then the second.
        int v = O == 2 ? i : i % 2, lane = 8 * (O == 2 ? o : i / 2);
        uint32_t* in_memory = counts + (v * n_pixels + pixel) * 16 + lane;
        if (add) count[i] = T::add(count[i], T::load(in_memory));
        if constexpr (kSink == Sink::kCounts) {
          T::store(in_memory, count[i]);
        } else {
          bits[v] |= emit(pixel, 16 * v + lane, count[i]) << lane;
        }
      }
    }
    if (kSink == Sink::kCounts || kSink == Sink::kDots || !e.signs) return;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * O; ++v) {
      int n = kWhole ? 16 : n_outputs - 16 * v;
      if (n > 0) store_signs(e, out_pixel[pixel], first_output + 16 * v, n, all_outputs, bits[v]);
    }
  }
};

// All pixels by one panel, from word number `word` on.
template <class T, int O, Sink kSink, bool kWhole>
void multiply_panel(const CountTile& t, const MatmulTile& block, const Epilogue& e, int64_t word,
                    int64_t n_words, const uint8_t* panel) {
  PairSink<T, O, kSink, kWhole> sink(t, block, e, word > 0);
  int64_t n_windows = (n_words * kNibblesPerWord + kWindow - 1) / kWindow, stride = pair_stride(t.x_words);
  const uint16_t* x = reinterpret_cast<const uint16_t*>(t.x) + word * kNibblesPerWord;
  for (int64_t pixel = 0; pixel < sink.n_pixels; pixel += 2, x += stride) {
    bool two = pixel + 1 < sink.n_pixels;
    sink.fetch(pixel), sink.fetch(pixel + two);
    PairSum<T> sums[O];
    look_up<T, O>(x, panel, n_windows, sums);
    sink.template finish<&PairSum<T>::a>(pixel, sums);
    if (two) sink.template finish<&PairSum<T>::b>(pixel + 1, sums);
  }
}

template <class T, int O, Sink kSink>
auto panel_loop(bool whole) {
  return whole ? multiply_panel<T, O, kSink, true> : multiply_panel<T, O, kSink, false>;
}

template <class T, int O>
void multiply_pairs(const CountTile& t, const MatmulTile& block, const Epilogue& e) {
  alignas(64) uint8_t panel[(kPanelNibbles + kWindow) * O * T::kBytes];
  bool only_bits = e.threshold && !e.values, whole = block.n_outputs == 32 * O;
  bool halves = e.dtype != Dtype::kFloat32 && (e.values || e.residual);
  bool part_computed = !whole && !e.only_values();  // the last block of some layers: 26 KB of code of its own
  bool in_memory = !only_bits && (halves || e.has_more() || part_computed);
  auto last_panel = in_memory         ? multiply_panel<T, O, Sink::kCounts, true>
                    : only_bits       ? panel_loop<T, O, Sink::kBits>(whole)
                    : e.only_values() ? panel_loop<T, O, Sink::kDots>(whole)
                                      : multiply_panel<T, O, Sink::kComputed, true>;
  int64_t words = std::max<int64_t>(1, t.n_words), n_stretches = (words + kPanelWords - 1) / kPanelWords;
  int64_t stretch = ((words + n_stretches - 1) / n_stretches + kWindow - 1) / kWindow * kWindow;
  for (int64_t word = 0; word == 0 || word < t.n_words; word += stretch) {
    int64_t n = std::min(stretch, t.n_words - word);
    lay_panel<T, O>(t, word, n, panel);
    auto multiply = word + stretch < t.n_words ? multiply_panel<T, O, Sink::kCounts, true> : last_panel;
    multiply(t, block, e, word, n, panel);
  }
  if (in_memory) emit_block<T>(block, e);
}

template <class T>
void pack_pixels_for_lookup(const PixelTile& t) {
  lookups_pay(t.n_pixels, t.lane_bits) ? pack_pixel_pairs<T>(t) : pack_pixels<T>(t);
}

template <class T>
void multiply_by_lookup(const CountTile& t, const MatmulTile& block, const Epilogue& e) {
  if (!lookups_pay(t.n_pixels, t.lane_bits)) return multiply<T>(t, block, e);
  t.lane_bits == 8 ? multiply_pairs<T, 2>(t, block, e) : multiply_pairs<T, 1>(t, block, e);
}

// The yardstick of multiply_pairs (see yardsticks.inl): a whole panel, again and again.
template <class T>
double lookup_loop(int64_t iterations) {
  alignas(64) uint8_t panel[kPanelNibbles * 2 * T::kBytes];
  uint16_t x[kPanelNibbles];
  for (int i = 0; i < kPanelNibbles * 2 * T::kBytes; ++i) panel[i] = static_cast<uint8_t>(i * 37 >> 3 & 15);
  for (int i = 0; i < kPanelNibbles; ++i) x[i] = static_cast<uint16_t>(2 * (i * 89 & 255));
  for (int64_t i = 0; i < iterations; ++i) {
    PairSum<T> sums[2];
    look_up<T, 2>(x, panel, kPanelNibbles / kWindow, sums);
    for (PairSum<T>& sum : sums) {
      T::keep_in_register(sum.a.both), T::keep_in_register(sum.a.odd);
      T::keep_in_register(sum.b.both), T::keep_in_register(sum.b.odd);
    }
  }
  return static_cast<double>(iterations) * kPanelNibbles * 4 * 2 * (2 * T::kBytes);
}

// SPDX-License-Identifier: Apache-2.0
// Binary dot products of pixels and a block of outputs: dot = bias - 2 * sum_k popcount(x[k] ^ w[k]).
//
// Lanes. 64 bytes of weights (a slice) hold L bits of 512 / L outputs: L = 8 in blocks of 64 outputs, 16 in
// blocks of 32, 32 in blocks of 16. A word of a sum takes 32 / L slices, for which the activations hold the
// same L bits in every lane of a 32-bit word, to be broadcast. The narrower the lanes, the less the end of a
// sum costs per output.
//
// Counting (Harley-Seal). Full adders gather 64 slices into bit planes of weight 1, 2, 4, 8, 16, 32 and one
// of weight 64; that one is counted at once, with a byte table, the others when the sum ends. The operands of
// the first adders come in pairs: slice 2j + 1 of x and of w is replaced by its exclusive or with slice 2j.
// Then t = w' ^ x' is d0 ^ d1 of the two differences, the sum plane is plane ^ t and the carry is (t ? plane
// : d0): three operations for two slices instead of four (with three-input logic instructions).
//
// Operations per slice: 1.5 for the pair, 0.94 for the other adders, 0.11 for the table: 2.55. The end of a
// sum costs about 7 per plane and 10 more, for 512 / L outputs.
//
// Include inside a target region and an anonymous namespace within bop2nd.

struct Weights {
  const uint32_t* slices;
  const int32_t* offset;  // of the next words from `slices`, in words
};

#include "count_bytes.inl"

// L: bits of a lane; P: pixels at a time; kIndexed: the words of w are found by their offsets.
template <class C, int L, int P, bool kIndexed>
struct CarrySaveCount {
  using I = typename C::I;
  static constexpr int kSlicesPerWord = 32 / L;
  static constexpr int kPlanes = 6;

  struct Planes {
    I plane[kPlanes][P];  // plane[i] has weight 1 << i
    I sixty_fours[P];     // in bytes
  };
  struct Source {
    const uint32_t* x[P];
    Weights w;

    BOP2ND_INLINE void advance(int64_t n_slices) {
      for (int p = 0; p < P; ++p) x[p] += n_slices;
      if constexpr (kIndexed)
        w.offset += n_slices / kSlicesPerWord;
      else
        w.slices += 16 * n_slices;
    }
    BOP2ND_INLINE I weight(int64_t slice) const {
      if constexpr (!kIndexed) return C::load(w.slices + 16 * slice);
      int64_t first = static_cast<int64_t>(w.offset[slice / kSlicesPerWord]) * kSlicesPerWord;
      return C::load(w.slices + 16 * (first + slice % kSlicesPerWord));
    }
  };

  // Adds slices at .. at + N - 1 to the planes of weight below N; what they carry has weight N.
  template <int N>
  static BOP2ND_INLINE void add_steps(const Source& s, int at, Planes& b, I (&carry)[P]) {
    if constexpr (N == 2) {
      I w0 = s.weight(at), w1 = s.weight(at + 1);
      if constexpr (!weights_paired(L)) w1 = C::bit_xor(w0, w1);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) C::pair_add(b.plane[0][p], w0, w1, s.x[p] + at, carry[p]);
    } else {
      constexpr int kPlane = N == 4 ? 1 : N == 8 ? 2 : N == 16 ? 3 : N == 32 ? 4 : 5;
      I first[P], second[P];
      add_steps<N / 2>(s, at, b, first);
      add_steps<N / 2>(s, at + N / 2, b, second);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) C::full_add(b.plane[kPlane][p], first[p], second[p], carry[p]);
    }
  }

  // The slices that do not fill a round of 64, fewest first: what N slices carry finds the plane of weight N
  // empty.
  static BOP2ND_INLINE void add_rest(Source& s, int64_t n, Planes& b) {
    if (L == 32 && n & 1) {  // the very last: pairs start at even slices
      I w = s.weight(n - 1);
      for (int p = 0; p < P; ++p) b.plane[0][p] = C::xor_word(w, s.x[p] + n - 1);
    }
    if (L >= 16 && n & 2) add_steps<2>(s, 0, b, b.plane[1]), s.advance(2);
    if (n & 4) add_steps<4>(s, 0, b, b.plane[2]), s.advance(4);
    if (n & 8) add_steps<8>(s, 0, b, b.plane[3]), s.advance(8);
    if (n & 16) add_steps<16>(s, 0, b, b.plane[4]), s.advance(16);
    if (n & 32) add_steps<32>(s, 0, b, b.plane[5]), s.advance(32);
  }

  template <int kPlane>
  static BOP2ND_INLINE void count_plane(const Planes& b, I (&bytes)[P]) {
    for (int p = 0; p < P; ++p)
      bytes[p] = C::add_bytes(bytes[p], C::template byte_counts<kPlane>(b.plane[kPlane][p]));
  }

  // counts[p][v]: differing bits in lanes 16 v .. 16 v + kLanes - 1 of the block. n_slices <= 64 *
  // kMaxRounds.
  static BOP2ND_INLINE void count(Source s, int64_t n_slices, I (&counts)[P][32 / L]) {
    Planes b;
    I zero = C::set1(0), low[P], high[P];
    for (int p = 0; p < P; ++p) {
      for (int i = 0; i < kPlanes; ++i) b.plane[i][p] = zero;
      b.sixty_fours[p] = low[p] = high[p] = zero;
    }
    add_rest(s, n_slices, b);
    for (int64_t round = n_slices / 64; round > 0; --round, s.advance(64)) {
      I carry[P];
      add_steps<64>(s, 0, b, carry);
      for (int p = 0; p < P; ++p)
        b.sixty_fours[p] = C::add_bytes(b.sixty_fours[p], C::template byte_counts<1>(carry[p]));
    }
    count_plane<0>(b, low);
    count_plane<1>(b, low);
    count_plane<2>(b, low);
    if (n_slices >= 8) count_plane<3>(b, low);
    if (n_slices >= 16) count_plane<4>(b, low);  // a byte holds at most 8 * (1 + 2 + 4 + 8 + 16) = 248
    for (int p = 0; p < P; ++p) {
      high[p] = C::add_bytes(b.sixty_fours[p], C::template byte_counts<0>(b.plane[5][p]));
      C::template sum_lanes<L>(low[p], high[p], counts[p]);  // low + 32 high
    }
  }
};

// Rounds of 64 slices that one count takes. Few enough for its bytes (15), and so many that the weights of a
// block, 4 KiB a round, stay in the nearest cache while all pixels pass by.
constexpr int64_t kMaxRounds = 5;

// One stretch of words of all pixels, P at a time from pixel `first` on. Returns the first pixel left over.
template <class C, int L, int P, bool kIndexed>
int64_t count_pixels_in_planes(const CountTile& t, int64_t first, int64_t word, int64_t n_words) {
  using Counter = CarrySaveCount<C, L, P, kIndexed>;
  constexpr int kVectors = 32 / L;
  const uint32_t* w = kIndexed ? t.w : t.w + word * 16 * kVectors;
  for (; first + P <= t.n_pixels; first += P) {
    for (int lane = 0; lane < 16; lane += C::kLanes) {
      typename Counter::Source s;
      for (int p = 0; p < P; ++p) s.x[p] = t.x + ((first + p) * t.x_words + word) * kVectors;
      s.w = {w + lane, t.w_offset + word};
      typename C::I counts[P][kVectors];
      Counter::count(s, n_words * kVectors, counts);
      for (int v = 0; v < kVectors; ++v) {
        for (int p = 0; p < P; ++p) {
          uint32_t* to = t.counts + (v * t.n_pixels + first + p) * 16 + lane;
          if (word > 0) counts[p][v] = C::add(counts[p][v], C::load(to));
          C::store_int(to, counts[p][v]);
        }
      }
    }
  }
  return first;
}

template <class C, int L, int P>
int64_t count_pixels(const CountTile& t, int64_t first, int64_t word, int64_t n_words) {
  if constexpr (C::kCountsBytes) {
    return t.w_contiguous ? count_pixels_in_bytes<C, L, P, false>(t, first, word, n_words)
                          : count_pixels_in_bytes<C, L, P, true>(t, first, word, n_words);
  } else {
    // Offsets of words side by side cost a load for a word. It is hidden behind the counting, but for a
    // single pixel (7 % of a dense layer's time with AVX-512); a second copy of all loops is a tenth of a
    // library.
    if constexpr (P == 1 && L == 8 && C::kLanes > 4) {
      if (t.w_contiguous) return count_pixels_in_planes<C, L, P, false>(t, first, word, n_words);
    }
    return count_pixels_in_planes<C, L, P, true>(t, first, word, n_words);
  }
}

template <class C, int L>
void count_lanes(const CountTile& t) {
  constexpr int64_t kRoundWords = 64 * L / 32;
  int64_t rounds = std::max<int64_t>(1, (t.n_words + kRoundWords - 1) / kRoundWords);
  int64_t n_stretches = (rounds + kMaxRounds - 1) / kMaxRounds;
  int64_t stretch = (rounds + n_stretches - 1) / n_stretches * kRoundWords;
  for (int64_t word = 0; word == 0 || word < t.n_words; word += stretch) {
    int64_t n = std::min(stretch, t.n_words - word);
    int64_t first = count_pixels<C, L, C::kPixels>(t, 0, word, n);
    count_pixels<C, L, 1>(t, first, word, n);
  }
}

template <class C>
void count(const CountTile& t) {
  t.lane_bits == 8 ? count_lanes<C, 8>(t) : t.lane_bits == 16 ? count_lanes<C, 16>(t) : count_lanes<C, 32>(t);
}

// Pairs of 32-bit lanes lie across words and runs: they are made at the end.
template <class C, int L>
BOP2ND_INLINE typename C::I spread_words(const uint32_t* from, int n) {
  typename C::I slices = C::template spread<L>(from, n);
  return weights_paired(L) ? C::make_pairs(slices) : slices;
}

// What a count takes as x: every word as 32 / L slices, in pairs. A store may run over into what is written
// next.
template <class C, int L>
void pack_lanes(const PixelTile& t) {
  constexpr int kSlices = 32 / L, kWords = C::kLanes / kSlices;
  for (int64_t p = 0; p < t.n_pixels; ++p) {
    uint32_t* to = t.slices + p * t.x_words * kSlices;
    for (int64_t run = 0; run < t.n_runs; ++run, to += t.run_words * kSlices) {
      const uint32_t* from = t.image + t.first_word[p] + t.run_offset[run];
      int64_t k = 0;
      for (; k + kWords <= t.run_words; k += kWords)
        C::store_int(to + k * kSlices, spread_words<C, L>(from + k, kWords));
      if (k < t.run_words)
        C::store_int(to + k * kSlices, spread_words<C, L>(from + k, static_cast<int>(t.run_words - k)));
    }
  }
  if (weights_paired(L)) return;
  for (int64_t i = 0; i < t.n_pixels * t.x_words; i += C::kLanes)
    C::store_int(t.slices + i, C::make_pairs(C::load(t.slices + i)));
}

template <class C>
void pack_pixels(const PixelTile& t) {
  t.lane_bits == 8 ? pack_lanes<C, 8>(t) : t.lane_bits == 16 ? pack_lanes<C, 16>(t) : pack_lanes<C, 32>(t);
}

// Dots as they are, in T.
template <class C, class T>
BOP2ND_INLINE void emit_dots(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  typename C::I bias = C::set1(static_cast<uint32_t>(t.bias));
  T* values = static_cast<T*>(e.values) + t.first_output;
  const int64_t *pixel = t.out_pixel, *end = pixel + t.n_pixels;
  int64_t all_outputs = t.all_outputs;
  for (int n = t.n_outputs; pixel < end; ++pixel, counts += 16) {
    if (*pixel < 0) continue;
    T* to = values + *pixel * all_outputs;
    for (int lane = 0; lane < 16 && lane < n; lane += C::kLanes)
      C::Lanes::store(to + lane, C::real(C::dot(bias, C::load(counts + lane))), n - lane);
  }
}

// Sign bits of a pixel's outputs from `first` on, 16 or the n that are left.
BOP2ND_INLINE void store_signs(const Epilogue& e, int64_t pixel, int64_t first, int n, int64_t all_outputs,
                               uint32_t bits) {
  int64_t half = first / 16, halves = (all_outputs + 31) / 32 * 2;
  uint16_t* to = reinterpret_cast<uint16_t*>(e.signs) + pixel * halves + half;
  to[0] = static_cast<uint16_t>(n < 16 ? bits & ((1u << n) - 1u) : bits);
  if (half % 2 == 0 && first + 16 >= all_outputs) to[1] = 0;
}

template <class C>
void emit_threshold_bits(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  typename C::I bias = C::set1(static_cast<uint32_t>(t.bias));
  for (int64_t p = 0; p < t.n_pixels; ++p) {
    if (t.out_pixel[p] < 0) continue;
    uint32_t bits = 0;
    for (int lane = 0; lane < 16; lane += C::kLanes) {
      typename C::I dot = C::dot(bias, C::load(counts + p * 16 + lane));
      bits |= C::less(dot, e.threshold + t.first_output + lane, t.n_outputs - lane) << lane;
    }
    store_signs(e, t.out_pixel[p], t.first_output, t.n_outputs, t.all_outputs, bits);
  }
}

template <class L>
BOP2ND_INLINE typename L::F choose(typename L::M m, typename L::F yes, typename L::F no) {
  return L::as_float(L::select(m, L::as_int(yes), L::as_int(no)));
}

// Dots are whole numbers below 2^24: bounds beyond hold for none or all of them.
template <class L>
BOP2ND_INLINE typename L::F clamp_lanes(typename L::F dot, int32_t low, int32_t high) {
  typename L::F least = L::setf(static_cast<float>(low)), most = L::setf(static_cast<float>(high));
  dot = choose<L>(L::greater(least, dot), least, dot);
  return choose<L>(L::greater(dot, most), most, dot);
}

// What the epilogue makes of real numbers, some outputs of a pixel from `channel` on, whose values lie at
// `at`. Returns their sign bits; those of the dots are asked for where there are thresholds.
template <class L, class T, bool kMore, class Below>
BOP2ND_INLINE uint32_t finish_lanes(const Epilogue& e, typename L::F x, int64_t at, int64_t channel, int n,
                                    const Below& below) {
  if (e.scale) x = L::mul(x, L::load(e.scale + channel, n));
  if (e.shift) x = L::add(x, L::load(e.shift + channel, n));
  if (e.residual) x = L::add(x, L::load(static_cast<const T*>(e.residual) + at, n));
  if constexpr (kMore) {
    if (e.relu) x = choose<L>(L::less_zero(x), L::setf(0.0f), x);
    if (e.slope) x = choose<L>(L::less_zero(x), L::mul(x, L::load(e.slope + channel, n)), x);
    if (e.post_shift) x = L::add(x, L::load(e.post_shift + channel, n));
  }
  if (e.values) L::store(static_cast<T*>(e.values) + at, x, n);
  if (!e.signs) return 0;
  if (e.threshold) return below();
  if (kMore && e.sign_shift) x = L::add(x, L::load(e.sign_shift + channel, n));
  return L::bits(L::less_zero(x));
}

// The same of exact dots.
template <class C, class T, bool kMore>
BOP2ND_INLINE uint32_t compute_lanes(const Epilogue& e, typename C::I dot, int64_t at, int64_t channel,
                                     int n) {
  using L = typename C::Lanes;
  typename L::F x = C::real(dot);
  if constexpr (kMore) x = clamp_lanes<L>(x, e.low, e.high);
  return finish_lanes<L, T, kMore>(e, x, at, channel, n,
                                   [&] { return C::less(dot, e.threshold + channel, n); });
}

// Everything else: values of type T, or sign words, or both, from scaled, shifted, added values. Takes
// copies: fields in memory would be read again after every store.
template <class C, class T, bool kMore>
void emit_computed(MatmulTile t, Epilogue e, const uint32_t* counts) {
  typename C::I bias = C::set1(static_cast<uint32_t>(t.bias));
  for (int64_t p = 0; p < t.n_pixels; ++p) {
    if (t.out_pixel[p] < 0) continue;
    int64_t at = t.out_pixel[p] * t.all_outputs + t.first_output;
    uint32_t bits = 0;
    for (int lane = 0; lane < 16 && lane < t.n_outputs; lane += C::kLanes) {
      typename C::I dot = C::dot(bias, C::load(counts + p * 16 + lane));
      bits |= compute_lanes<C, T, kMore>(e, dot, at + lane, t.first_output + lane, t.n_outputs - lane)
              << lane;
    }
    if (e.signs) store_signs(e, t.out_pixel[p], t.first_output, t.n_outputs, t.all_outputs, bits);
  }
}

template <class C, class T>
void emit_tile(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  if (e.only_values()) return emit_dots<C, T>(t, e, counts);
  if (e.threshold && !e.values) return emit_threshold_bits<C>(t, e, counts);
  e.has_more() ? emit_computed<C, T, true>(t, e, counts) : emit_computed<C, T, false>(t, e, counts);
}

template <class C>
void emit(const MatmulTile& t, const Epilogue& e) {
  switch (e.dtype) {
    case Dtype::kBFloat16:
      return emit_tile<C, BFloat16>(t, e, t.counts);
    case Dtype::kFloat16:
      return emit_tile<C, Float16>(t, e, t.counts);
    default:
      return emit_tile<C, float>(t, e, t.counts);
  }
}

// A block of counts, 16 outputs after 16.
template <class C>
void emit_block(MatmulTile t, const Epilogue& e) {
  for (int left = t.n_outputs; left > 0; left -= 16, t.first_output += 16, t.counts += 16 * t.n_pixels) {
    t.n_outputs = std::min(left, 16);
    emit<C>(t, e);
  }
}

template <class C>
void multiply(const CountTile& t, const MatmulTile& block, const Epilogue& e) {
  count<C>(t);
  emit_block<C>(block, e);
}

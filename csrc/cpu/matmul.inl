// SPDX-License-Identifier: Apache-2.0
// Binary dot products of pixels and a block of 16 outputs: dot = bias - 2 * sum_k popcount(x[k] ^ w[k]).
// Weights lie as [k][16 outputs], so that one activation word, broadcast, meets 16 weights per vector.
//
// DirectCount needs a vector popcount: xor, popcount, add per word, 3 operations.
//
// CarrySaveCount needs none (Harley-Seal): full adders gather 16 words into bit planes of weight 1, 2, 4, 8
// and one plane of weight 16; only that one is counted, with a byte table. Its operands come in pairs: word
// 2j + 1 of x and of w is replaced by its exclusive or with word 2j. Then t = w' ^ x' is d0 ^ d1 of the two
// differences, the sum plane is plane ^ t and the carry is (t ? plane : d0): three operations for two words
// instead of four (with three-input logic instructions). Operations per word: 1.5 for the pair, 0.875 for the
// other adders, 0.44 for the table: 2.8, against 8 for a table look-up per word and 3 for DirectCount. The
// planes that remain cost about 35 once per dot product.
//
// Include inside a target region and an anonymous namespace within bop2nd.

// How the weights of a block are read: word k at 16 k, in pairs or plain, or plain at w_offset[k].
enum class Rows { kPaired, kPlain, kIndexed };

struct Weights {
  const uint32_t* words;
  const int32_t* offset;  // of kIndexed, already that of word 0
};

template <class C, Rows kRows>
BOP2ND_INLINE typename C::I load_weight(const Weights& w, int64_t k) {
  if constexpr (kRows == Rows::kIndexed) return C::load(w.words + w.offset[k]);
  return C::load(w.words + 16 * k);
}

template <class C, int P, Rows kRows>
struct DirectCount {
  using I = typename C::I;
  static constexpr bool kPaired = false;

  // count[p] = number of differing bits per lane; pixel p's words start at x + p * n_words.
  static BOP2ND_INLINE void accumulate(const uint32_t* x, const Weights& w, int64_t n_words, I (&count)[P]) {
    for (int p = 0; p < P; ++p) count[p] = C::set1(0);
    const uint32_t* pixel[P];
    for (int p = 0; p < P; ++p) pixel[p] = x + p * n_words;
    for (int64_t k = 0; k < n_words; ++k) {
      I weight = load_weight<C, kRows>(w, k);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) count[p] = C::add(count[p], C::popcount(C::xor_word(weight, pixel[p] + k)));
    }
  }
};

template <class C, int P, Rows kRows>
struct CarrySaveCount {
  using I = typename C::I;
  static constexpr bool kPaired = true;
  // Bytes of `sixteens` grow by at most 8 per 16 words.
  static constexpr int kMaxRounds = 31;

  struct Planes {
    I one[P], two[P], four[P], eight[P], sixteens[P];
  };
  struct Source {
    const uint32_t* x[P];
    Weights w;

    BOP2ND_INLINE void advance(int64_t n) {
      for (int p = 0; p < P; ++p) x[p] += n;
      if constexpr (kRows == Rows::kIndexed)
        w.offset += n;
      else
        w.words += 16 * n;
    }
  };

  static BOP2ND_INLINE void half_add(I& plane, I& carry) {
    I old = plane;
    plane = C::bit_xor(old, carry);
    carry = C::bit_and(old, carry);
  }

  // Adds words at .. at + N - 1 to the planes of weight below N; what they carry has weight N.
  template <int N>
  static BOP2ND_INLINE void add_words(const Source& s, int at, Planes& b, I (&carry)[P]) {
    if constexpr (N == 2) {
      I w0 = load_weight<C, kRows>(s.w, at), w1 = load_weight<C, kRows>(s.w, at + 1);
      if constexpr (kRows != Rows::kPaired) w1 = C::bit_xor(w0, w1);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) C::pair_add(b.one[p], w0, w1, s.x[p] + at, carry[p]);
    } else {
      I first[P], second[P];
      add_words<N / 2>(s, at, b, first);
      add_words<N / 2>(s, at + N / 2, b, second);
      I* plane = N == 4 ? b.two : N == 8 ? b.four : b.eight;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) C::full_add(plane[p], first[p], second[p], carry[p]);
    }
  }

  // The pairs that do not fill a round of 16 words; they come first, so that `eight` carries nothing out.
  static BOP2ND_INLINE void add_rest(Source& s, int64_t n, Planes& b) {
    I carry[P];
    if (n & 8) {
      add_words<8>(s, 0, b, b.eight);
      s.advance(8);
    }
    if (n & 4) {
      add_words<4>(s, 0, b, carry);
      for (int p = 0; p < P; ++p) {
        half_add(b.four[p], carry[p]);
        b.eight[p] = C::bit_xor(b.eight[p], carry[p]);
      }
      s.advance(4);
    }
    if (n & 2) {
      add_words<2>(s, 0, b, carry);
      for (int p = 0; p < P; ++p) {
        half_add(b.two[p], carry[p]);
        half_add(b.four[p], carry[p]);
        b.eight[p] = C::bit_xor(b.eight[p], carry[p]);
      }
      s.advance(2);
    }
  }

  static BOP2ND_INLINE void add_single(const Source& s, int64_t at, Planes& b) {
    I w = load_weight<C, kRows>(s.w, at);
    for (int p = 0; p < P; ++p) {
      I carry = C::xor_word(w, s.x[p] + at);
      half_add(b.one[p], carry);
      half_add(b.two[p], carry);
      half_add(b.four[p], carry);
      b.eight[p] = C::bit_xor(b.eight[p], carry);
    }
  }

  static BOP2ND_INLINE void add_rounds(Source& s, int64_t n_rounds, Planes& b) {
    for (int64_t round = 0; round < n_rounds; ++round, s.advance(16)) {
      I carry[P];
      add_words<16>(s, 0, b, carry);
      for (int p = 0; p < P; ++p) b.sixteens[p] = C::add_bytes(b.sixteens[p], C::byte_counts(carry[p]));
    }
  }

  static BOP2ND_INLINE I planes_in_bytes(const Planes& b, int p) {
    I sum = C::byte_counts(b.eight[p]);  // at most 8 * (8 + 4 + 2 + 1) = 120 in a byte
    sum = C::add_bytes(C::add_bytes(sum, sum), C::byte_counts(b.four[p]));
    sum = C::add_bytes(C::add_bytes(sum, sum), C::byte_counts(b.two[p]));
    return C::add_bytes(C::add_bytes(sum, sum), C::byte_counts(b.one[p]));
  }

  static BOP2ND_INLINE void accumulate(const uint32_t* x, const Weights& w, int64_t n_words, I (&count)[P]) {
    Planes b;
    I zero = C::set1(0);
    for (int p = 0; p < P; ++p)
      b.one[p] = b.two[p] = b.four[p] = b.eight[p] = b.sixteens[p] = count[p] = zero;
    Source s;
    for (int p = 0; p < P; ++p) s.x[p] = x + p * n_words;
    s.w = w;
    if (n_words & 1) add_single(s, n_words - 1, b);
    add_rest(s, n_words % 16, b);
    int64_t rounds = n_words / 16;
    for (; rounds > kMaxRounds; rounds -= kMaxRounds) {
      add_rounds(s, kMaxRounds, b);
      for (int p = 0; p < P; ++p) count[p] = C::add(count[p], C::add_up(b.sixteens[p], zero));
      for (int p = 0; p < P; ++p) b.sixteens[p] = zero;
    }
    add_rounds(s, rounds, b);
    for (int p = 0; p < P; ++p) count[p] = C::add(count[p], C::add_up(b.sixteens[p], planes_in_bytes(b, p)));
  }
};

// Counts for all pixels of the tile, 16 to a pixel.
template <class C, template <class, int, Rows> class Counter, Rows kRows>
void count_tile(const MatmulTile& t, const uint32_t* w, uint32_t* counts) {
  constexpr int P = C::kPixels;
  int64_t n = t.n_words, p = 0;
  for (; p + P <= t.n_pixels; p += P) {
    for (int lane = 0; lane < 16; lane += C::kLanes) {
      typename C::I count[P];
      Counter<C, P, kRows>::accumulate(t.x + p * n, {w + lane, t.w_offset}, n, count);
      for (int i = 0; i < P; ++i) C::store_int(counts + (p + i) * 16 + lane, count[i]);
    }
  }
  for (; p < t.n_pixels; ++p) {
    for (int lane = 0; lane < 16; lane += C::kLanes) {
      typename C::I count[1];
      Counter<C, 1, kRows>::accumulate(t.x + p * n, {w + lane, t.w_offset}, n, count);
      C::store_int(counts + p * 16 + lane, count[0]);
    }
  }
}

template <class C>
BOP2ND_INLINE void pair_weights(const uint32_t* from, int64_t n_words, uint32_t* to) {
  for (int64_t i = 0; i < 16 * n_words; i += 32) {
    for (int lane = 0; lane < 16; lane += C::kLanes) {
      typename C::I first = C::load(from + i + lane);
      C::store_int(to + i + lane, first);
      if (i + 16 >= 16 * n_words) continue;
      C::store_int(to + i + 16 + lane, C::bit_xor(first, C::load(from + i + 16 + lane)));
    }
  }
}

// Dots as they are, in T.
template <class C, class T>
void emit_dots(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  typename C::I bias = C::set1(static_cast<uint32_t>(t.bias));
  for (int64_t p = 0; p < t.n_pixels; ++p) {
    T* values = static_cast<T*>(e.values) + t.out_pixel[p] * t.all_outputs + t.first_output;
    for (int lane = 0; lane < 16 && lane < t.n_outputs; lane += C::kLanes) {
      typename C::I dot = C::dot(bias, C::load(counts + p * 16 + lane));
      C::Lanes::store(values + lane, C::real(dot), t.n_outputs - lane);
    }
  }
}

BOP2ND_INLINE void store_signs(const MatmulTile& t, const Epilogue& e, int64_t pixel, uint32_t bits) {
  int64_t half = t.first_output / 16, halves = (t.all_outputs + 31) / 32 * 2;
  uint16_t* to = e.signs + pixel * halves + half;
  to[0] = static_cast<uint16_t>(bits & ((1u << t.n_outputs) - 1u));
  if (half % 2 == 0 && t.first_output + 16 >= t.all_outputs) to[1] = 0;
}

template <class C>
void emit_threshold_bits(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  typename C::I bias = C::set1(static_cast<uint32_t>(t.bias));
  for (int64_t p = 0; p < t.n_pixels; ++p) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 16; lane += C::kLanes) {
      typename C::I dot = C::dot(bias, C::load(counts + p * 16 + lane));
      bits |= C::less(dot, e.threshold + t.first_output + lane, t.n_outputs - lane) << lane;
    }
    store_signs(t, e, t.out_pixel[p], bits);
  }
}

// Everything else: values of type T, or sign words, or both, from scaled, shifted, added values.
template <class C, class T>
void emit_computed(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  using L = typename C::Lanes;
  typename C::I bias = C::set1(static_cast<uint32_t>(t.bias));
  for (int64_t p = 0; p < t.n_pixels; ++p) {
    int64_t at = t.out_pixel[p] * t.all_outputs + t.first_output;
    uint32_t bits = 0;
    for (int lane = 0; lane < 16 && lane < t.n_outputs; lane += C::kLanes) {
      int n = t.n_outputs - lane;
      int64_t o = t.first_output + lane;
      typename C::I dot = C::dot(bias, C::load(counts + p * 16 + lane));
      typename L::F x = C::real(dot);
      if (e.scale) x = L::mul(x, L::load(e.scale + o, n));
      if (e.shift) x = L::add(x, L::load(e.shift + o, n));
      if (e.residual) x = L::add(x, L::load(static_cast<const T*>(e.residual) + at + lane, n));
      if (e.values) L::store(static_cast<T*>(e.values) + at + lane, x, n);
      bits |= (e.threshold ? C::less(dot, e.threshold + o, n) : L::bits(L::less_zero(x))) << lane;
    }
    if (e.signs) store_signs(t, e, t.out_pixel[p], bits);
  }
}

template <class C, class T>
void emit_tile(const MatmulTile& t, const Epilogue& e, const uint32_t* counts) {
  if (e.only_values()) return emit_dots<C, T>(t, e, counts);
  if (e.threshold && !e.values) return emit_threshold_bits<C>(t, e, counts);
  emit_computed<C, T>(t, e, counts);
}

// Making the pairs once costs about 1 cycle a word, making them in the loop 1/4 cycle a word and pixel.
constexpr int64_t kPairPixels = 8;

template <class C, template <class, int, Rows> class Counter>
void matmul(const MatmulTile& t, const Epilogue& e) {
  uint32_t* counts = t.scratch;
  if (!t.w_contiguous) {
    count_tile<C, Counter, Rows::kIndexed>(t, t.w, counts);
  } else if (Counter<C, 1, Rows::kPlain>::kPaired && t.n_pixels >= kPairPixels && t.n_words > 0) {
    uint32_t* paired = t.scratch + t.n_pixels * 16;
    pair_weights<C>(t.w + t.w_offset[0], t.n_words, paired);
    count_tile<C, Counter, Rows::kPaired>(t, paired, counts);
  } else {
    count_tile<C, Counter, Rows::kPlain>(t, t.w + (t.n_words > 0 ? t.w_offset[0] : 0), counts);
  }
  switch (e.dtype) {
    case Dtype::kBFloat16:
      return emit_tile<C, BFloat16>(t, e, counts);
    case Dtype::kFloat16:
      return emit_tile<C, Float16>(t, e, counts);
    default:
      return emit_tile<C, float>(t, e, counts);
  }
}

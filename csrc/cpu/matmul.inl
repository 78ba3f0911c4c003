// SPDX-License-Identifier: Apache-2.0
// Binary dot products of pixels and a block of 16 outputs: dot = bias - 2 * sum_k popcount(x[k] ^ w[k]).
// Weights lie as [k][16 outputs], so that one activation word, broadcast, meets 16 weights per vector.
//
// DirectCount needs a vector popcount: xor, popcount, add per word, 3 operations.
// CarrySaveCount needs none (Harley-Seal): full adders gather 16 words into bit planes of weight 1, 2, 4, 8 and
// one plane of weight 16, and only that plane is counted, with a byte table. Per word: 1 xor, 15/16 full adders
// (2 operations where there is a three-input logic instruction, else 5) and 7/16 for the table, 3.3 in all,
// against 8 for a table look-up per word; the planes that remain cost about 35 once per dot product.
//
// Include inside a target region and an anonymous namespace within bop2nd.

// Both counters: accumulate(x, w, taps, count) sets count[p] to the number of differing bits per lane.
// `w` already points at the lanes wanted.

template <class C, int P>
struct DirectCount {
  using I = typename C::I;
  static BOP2ND_INLINE void accumulate(const uint32_t* const* x, const uint32_t* w, const TapList& taps,
                                       I (&count)[P]) {
    for (int p = 0; p < P; ++p) count[p] = C::set1(0);
    for (int64_t k = 0; k < taps.n_words; ++k) {
      I weight = C::load(w + taps.w_offset[k]);
      int64_t at = taps.x_offset[k];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) count[p] = C::add(count[p], C::popcount(C::xor_word(weight, x[p] + at)));
    }
  }
};

template <class C, int P>
struct CarrySaveCount {
  using I = typename C::I;
  // Bytes of `sixteens` grow by at most 8 per 16 words.
  static constexpr int kMaxRounds = 31;

  struct Planes {
    I one[P], two[P], four[P], eight[P], sixteens[P];
  };
  struct Source {
    const uint32_t* const* x;
    const uint32_t* w;
    const int32_t* x_offset;
    const int32_t* w_offset;
  };

  static BOP2ND_INLINE void full_add(I& plane, I a, I b, I& carry) {
    I old = plane;
    plane = C::sum3(old, a, b);
    carry = C::majority(old, a, b);
  }
  static BOP2ND_INLINE void half_add(I& plane, I a, I& carry) {
    I old = plane;
    plane = C::bit_xor(old, a);
    carry = C::bit_and(old, a);
  }

  // Adds words k .. k + N - 1 to the planes of weight below N; what they carry has weight N.
  template <int N>
  static BOP2ND_INLINE void add_words(const Source& s, int64_t k, Planes& b, I (&carry)[P]) {
    if constexpr (N == 2) {
      I w0 = C::load(s.w + s.w_offset[k]), w1 = C::load(s.w + s.w_offset[k + 1]);
      int64_t x0 = s.x_offset[k], x1 = s.x_offset[k + 1];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        full_add(b.one[p], C::xor_word(w0, s.x[p] + x0), C::xor_word(w1, s.x[p] + x1), carry[p]);
      }
    } else {
      I first[P], second[P];
      add_words<N / 2>(s, k, b, first);
      add_words<N / 2>(s, k + N / 2, b, second);
      I* plane = N == 4 ? b.two : N == 8 ? b.four : b.eight;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) full_add(plane[p], first[p], second[p], carry[p]);
    }
  }

  // The n < 16 words that do not fill a round; they come first, so that nothing is carried out of `eight`.
  static BOP2ND_INLINE void add_rest(const Source& s, int n, Planes& b) {
    I carry[P];
    int k = 0;
    if (n & 8) {
      add_words<8>(s, k, b, b.eight);
      k += 8;
    }
    if (n & 4) {
      add_words<4>(s, k, b, carry);
      for (int p = 0; p < P; ++p) {
        half_add(b.four[p], carry[p], carry[p]);
        b.eight[p] = C::bit_xor(b.eight[p], carry[p]);
      }
      k += 4;
    }
    if (n & 2) {
      add_words<2>(s, k, b, carry);
      for (int p = 0; p < P; ++p) {
        half_add(b.two[p], carry[p], carry[p]);
        half_add(b.four[p], carry[p], carry[p]);
        b.eight[p] = C::bit_xor(b.eight[p], carry[p]);
      }
      k += 2;
    }
    if (n & 1) {
      I w = C::load(s.w + s.w_offset[k]);
      for (int p = 0; p < P; ++p) {
        half_add(b.one[p], C::xor_word(w, s.x[p] + s.x_offset[k]), carry[p]);
        half_add(b.two[p], carry[p], carry[p]);
        half_add(b.four[p], carry[p], carry[p]);
        b.eight[p] = C::bit_xor(b.eight[p], carry[p]);
      }
    }
  }

  static BOP2ND_INLINE I planes_in_bytes(const Planes& b, int p) {
    I sum = C::byte_counts(b.eight[p]);  // at most 8 * (8 + 4 + 2 + 1) = 120 in a byte
    sum = C::add_bytes(C::add_bytes(sum, sum), C::byte_counts(b.four[p]));
    sum = C::add_bytes(C::add_bytes(sum, sum), C::byte_counts(b.two[p]));
    return C::add_bytes(C::add_bytes(sum, sum), C::byte_counts(b.one[p]));
  }

  static BOP2ND_INLINE void accumulate(const uint32_t* const* x, const uint32_t* w, const TapList& taps,
                                       I (&count)[P]) {
    Planes b;
    I zero = C::set1(0), carry[P];
    for (int p = 0; p < P; ++p) b.one[p] = b.two[p] = b.four[p] = b.eight[p] = b.sixteens[p] = count[p] = zero;
    Source s{x, w, taps.x_offset, taps.w_offset};
    int64_t k = taps.n_words % 16;
    add_rest(s, static_cast<int>(k), b);
    while (taps.n_words - k > 16 * kMaxRounds) {
      for (int round = 0; round < kMaxRounds; ++round, k += 16) {
        add_words<16>(s, k, b, carry);
        for (int p = 0; p < P; ++p) b.sixteens[p] = C::add_bytes(b.sixteens[p], C::byte_counts(carry[p]));
      }
      for (int p = 0; p < P; ++p) count[p] = C::add(count[p], C::add_up(b.sixteens[p], zero));
      for (int p = 0; p < P; ++p) b.sixteens[p] = zero;
    }
    for (; k < taps.n_words; k += 16) {
      add_words<16>(s, k, b, carry);
      for (int p = 0; p < P; ++p) b.sixteens[p] = C::add_bytes(b.sixteens[p], C::byte_counts(carry[p]));
    }
    for (int p = 0; p < P; ++p) count[p] = C::add(count[p], C::add_up(b.sixteens[p], planes_in_bytes(b, p)));
  }
};

// T is the type of the outputs, void for threshold bits.
template <class C, template <class, int> class Counter, class T, int P>
BOP2ND_INLINE void dot_pixels(const MatmulTile& t, int64_t first) {
  const uint32_t* x[P];
  for (int p = 0; p < P; ++p) x[p] = t.x + t.x_base[first + p];
  typename C::I bias = C::set1(static_cast<uint32_t>(t.taps.bias));
  uint32_t bits[P] = {};
  for (int lane = 0; lane < 16; lane += C::kLanes) {
    typename C::I count[P];
    Counter<C, P>::accumulate(x, t.w + lane, t.taps, count);
    for (int p = 0; p < P; ++p) {
      typename C::I dot = C::dot(bias, count[p]);
      if constexpr (std::is_void_v<T>) {
        bits[p] |= C::less(dot, t.threshold + lane, t.n_outputs - lane) << lane;
      } else {
        C::store(static_cast<T*>(t.out) + t.out_offset[first + p] + lane, dot, t.n_outputs - lane);
      }
    }
  }
  if constexpr (std::is_void_v<T>) {
    for (int p = 0; p < P; ++p) {
      uint16_t* half = static_cast<uint16_t*>(t.out) + t.out_offset[first + p];
      half[0] = static_cast<uint16_t>(bits[p]);
      if (t.pad_half) half[1] = 0;
    }
  }
}

template <class C, template <class, int> class Counter, class T>
void dot_tile(const MatmulTile& t) {
  int64_t p = 0;
  for (; p + C::kPixels <= t.n_pixels; p += C::kPixels) dot_pixels<C, Counter, T, C::kPixels>(t, p);
  for (; p < t.n_pixels; ++p) dot_pixels<C, Counter, T, 1>(t, p);
}

template <class C, template <class, int> class Counter>
void matmul(const MatmulTile& t, Emit emit) {
  switch (emit) {
    case Emit::kFloat32: return dot_tile<C, Counter, float>(t);
    case Emit::kBFloat16: return dot_tile<C, Counter, BFloat16>(t);
    case Emit::kFloat16: return dot_tile<C, Counter, Float16>(t);
    case Emit::kBits: return dot_tile<C, Counter, void>(t);
  }
}

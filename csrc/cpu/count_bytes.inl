// SPDX-License-Identifier: Apache-2.0
// Counting for vectors that have a popcount of bytes (NEON): C::kCountsBytes. Lanes, pairs and layouts are
// those of matmul.inl, which includes this file.
//
// One adder for a pair of slices, then a popcount of its carry: four instructions for the adder, one for the
// popcount, one to add it, for 2 * 16 bytes; a second layer of adders would cost three to save two. The pair
// of activations is in all lanes at once for the four vectors of a slice: two more for eight times 16 bytes,
// 3.25 instructions for 128 bits. A byte of carries holds 31 pairs; then it is added to the wider sums.
// tests/test_arm_code.py reads the loop's machine code, docs/performance.md says what follows for processors.

constexpr int kSliceVectors = 4;    // a slice is 64 bytes
constexpr int64_t kBytePairs = 31;  // 8 * 31 <= 255

// kIndexed: the words of w do not lie side by side, and are found by their offsets.
template <class C, int L, int P, bool kIndexed>
struct ByteCount {
  using I = typename C::I;
  using Bytes = typename C::Bytes;
  using Wide = typename C::template Wide<L>;
  static constexpr int kSlicesPerWord = 32 / L;

  const uint32_t* x[P];
  Weights w;
  I ones[P][kSliceVectors];
  Wide twos[P][kSliceVectors];

  BOP2ND_INLINE const uint32_t* slice_at(int64_t slice) const {
    if constexpr (!kIndexed) return w.slices + 16 * slice;
    int64_t first = static_cast<int64_t>(w.offset[slice / kSlicesPerWord]) * kSlicesPerWord;
    return w.slices + 16 * (first + slice % kSlicesPerWord);
  }

  // Pairs [begin, end), at most kBytePairs of them.
  BOP2ND_INLINE void add_pairs(int64_t begin, int64_t end) {
    Bytes carries[P][kSliceVectors];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int l = 0; l < kSliceVectors; ++l) carries[p][l] = C::no_bytes();
    }
    for (int64_t slice = 2 * begin; slice < 2 * end; slice += 2) {
      const uint32_t *even = slice_at(slice), *odd = slice_at(slice + 1);
#pragma GCC unroll 4
      for (int l = 0; l < kSliceVectors; ++l) {
        I w0 = C::load(even + 4 * l), w1 = C::load(odd + 4 * l);
        if constexpr (!weights_paired(L)) w1 = C::bit_xor(w0, w1);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          I carry;
          C::pair_add(ones[p][l], w0, w1, x[p] + slice, carry);
          carries[p][l] = C::add_bytes(carries[p][l], C::popcounts(carry));
        }
      }
    }
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int l = 0; l < kSliceVectors; ++l) C::add_to(twos[p][l], carries[p][l]);
    }
  }

  BOP2ND_INLINE void count(int64_t n_slices) {
    int64_t last = n_slices - 1;
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int l = 0; l < kSliceVectors; ++l) {
        C::clear(twos[p][l]);
        ones[p][l] = C::set1(0);
        if (L == 32 && n_slices % 2) ones[p][l] = C::xor_word(C::load(slice_at(last) + 4 * l), x[p] + last);
      }
    }
    for (int64_t pair = 0, n = n_slices / 2; pair < n; pair += kBytePairs)
      add_pairs(pair, std::min(n, pair + kBytePairs));
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int l = 0; l < kSliceVectors; ++l)
        C::twice(twos[p][l]), C::add_to(twos[p][l], C::popcounts(ones[p][l]));
    }
  }
};

// As count_pixels.
template <class C, int L, int P, bool kIndexed>
int64_t count_pixels_in_bytes(const CountTile& t, int64_t first, int64_t word, int64_t n_words) {
  constexpr int kVectors = 32 / L;
  ByteCount<C, L, P, kIndexed> counter;
  counter.w = {kIndexed ? t.w : t.w + word * 16 * kVectors, t.w_offset + word};
  for (; first + P <= t.n_pixels; first += P) {
    for (int p = 0; p < P; ++p) counter.x[p] = t.x + ((first + p) * t.x_words + word) * kVectors;
    counter.count(n_words * kVectors);
    for (int p = 0; p < P; ++p) {
      for (int l = 0; l < kSliceVectors; ++l) {
        typename C::I counts[kVectors];
        C::widen(counter.twos[p][l], counts);
        for (int v = 0; v < kVectors; ++v) {
          uint32_t* to = t.counts + (v * t.n_pixels + first + p) * 16 + 4 * l;
          C::store_int(to, word > 0 ? C::add(counts[v], C::load(to)) : counts[v]);
        }
      }
    }
  }
  return first;
}

// The yardstick of multiply, as plane_loop.
template <class C>
double byte_loop(int64_t iterations) {
  constexpr int kSlices = 64 * 5, P = C::kPixels;
  alignas(64) uint32_t x[P * kSlices], w[kSlices * 16];
  for (int i = 0; i < P * kSlices; ++i) x[i] = 0x01234567u * static_cast<uint32_t>(i + 1);
  for (int i = 0; i < kSlices * 16; ++i) w[i] = 0x89ABCDEFu * static_cast<uint32_t>(i + 1);
  ByteCount<C, 8, P, false> counter;
  for (int p = 0; p < P; ++p) counter.x[p] = x + p * kSlices;
  counter.w = {w, nullptr};
  for (int64_t i = 0; i < iterations; ++i) {
    counter.count(kSlices);
    for (int p = 0; p < P; ++p) {
      for (int l = 0; l < kSliceVectors; ++l) {
        for (auto& sum : counter.twos[p][l].sum) C::keep_in_register(sum);
      }
    }
  }
  return static_cast<double>(iterations) * kSlices * P * 512;
}

// SPDX-License-Identifier: Apache-2.0
// What the loops are measured against: the same work without its memory accesses, the same memory accesses
// without the work.
//
// Include inside a target region and an anonymous namespace within bop2nd, after matmul.inl.

// The yardstick of matmul: the same counting of the longest sum that one count takes, on operands in the
// nearest cache. Returns binary multiply-accumulates (one bit each).
template <class C>
double plane_loop(int64_t iterations) {
  constexpr int kSlices = 64 * kMaxRounds;
  constexpr int P = C::kPixels;
  using Counter = CarrySaveCount<C, 8, P, false>;
  alignas(64) uint32_t x[P * kSlices], w[kSlices * 16];
  for (int i = 0; i < P * kSlices; ++i) x[i] = 0x01234567u * static_cast<uint32_t>(i + 1);
  for (int i = 0; i < kSlices * 16; ++i) w[i] = 0x89ABCDEFu * static_cast<uint32_t>(i + 1);
  typename Counter::Source s;
  for (int p = 0; p < P; ++p) s.x[p] = x + p * kSlices;
  s.w = {w, nullptr};
  typename C::I counts[P][4];
  for (int64_t i = 0; i < iterations; ++i) {
    Counter::count(s, kSlices, counts);
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < 4; ++v) C::keep_in_register(counts[p][v]);
    }
  }
  return static_cast<double>(iterations) * kSlices * P * C::kLanes * 32;
}

template <class C>
double register_loop(int64_t iterations) {
  if constexpr (C::kCountsBytes) {
    return byte_loop<C>(iterations);
  } else {
    return plane_loop<C>(iterations);
  }
}

// The yardstick of the step: reads gradient, moments and words, as far ahead as the step, and writes moments
// and words as they were, so that it can run on a step's own arrays. `zero` is 0, which no compiler knows.
template <class V, int kGradBytes, int kStateBytes>
void stream_elements(const uint32_t* grad, uint32_t* m, uint32_t* v, uint32_t* words, int64_t first_word,
                     int64_t n_words, uint32_t zero) {
  constexpr int kGrad = 8 * kGradBytes, kState = 8 * kStateBytes;  // of 4 bytes, for each word
  for (int64_t w = first_word; w < first_word + n_words; ++w) {
    fetch_ahead(grad + w * kGrad, kGrad);
    fetch_ahead(m + w * kState, kState), fetch_ahead(v + w * kState, kState);
    typename V::I nothing = V::set1(zero);
#pragma GCC unroll 4
    for (int64_t e = w * kGrad; e < (w + 1) * kGrad; e += V::kLanes) {
      nothing = V::bit_and(nothing, V::load_int(grad + e));
    }
#pragma GCC unroll 4
    for (int64_t e = w * kState; e < (w + 1) * kState; e += V::kLanes) {
      V::store_int(m + e, V::bit_xor(V::load_int(m + e), nothing));
      V::store_int(v + e, V::bit_xor(V::load_int(v + e), nothing));
    }
    words[w] ^= zero;
  }
}

template <class V>
void stream(const void* grad, void* m, void* v, uint32_t* words, int grad_bytes, int state_bytes,
            int64_t first_word, int64_t n_words) {
  volatile uint32_t zero = 0;
  auto loop = state_bytes == 2  ? stream_elements<V, 2, 2>
              : grad_bytes == 2 ? stream_elements<V, 2, 4>
                                : stream_elements<V, 4, 4>;
  loop(static_cast<const uint32_t*>(grad), static_cast<uint32_t*>(m), static_cast<uint32_t*>(v), words,
       first_word, n_words, zero);
}

// The yardstick of what reads one array and writes another: n_read and n_written are of 4 bytes.
template <class V>
void traffic(const uint32_t* read, int64_t n_read, uint32_t* write, int64_t n_written) {
  volatile uint32_t zero = 0;
  typename V::I nothing[4] = {V::set1(zero), V::set1(zero), V::set1(zero), V::set1(zero)};
  int64_t i = 0;
  for (; i + 4 * V::kLanes <= n_read; i += 4 * V::kLanes) {
    fetch_ahead(read + i, 4 * V::kLanes);
    for (int k = 0; k < 4; ++k) {
      nothing[k] = V::bit_and(nothing[k], V::load_int(read + i + k * V::kLanes));
    }
  }
  typename V::I all = V::bit_xor(V::bit_xor(nothing[0], nothing[1]), V::bit_xor(nothing[2], nothing[3]));
  for (i = 0; i + V::kLanes <= n_written; i += V::kLanes) V::store_int(write + i, all);
}
